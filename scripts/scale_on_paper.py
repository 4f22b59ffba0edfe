"""What galleries of 10⁷, 10⁸ and 10⁹ crops need, computed from measured rates.

    python -m scripts.scale_on_paper

Prints the tables of docs/scale.md. Rates of a CPU come from the files in benchmarks/results; what
no file holds (a GPU's memory and its bandwidth, prices, the size of a crop) is an assumption: an
option, and a row of the first table.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import CMTConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SIZES = (10**7, 10**8, 10**9)
MEASURED_ROWS = 1_000_000  # the largest gallery in the files
COLUMNS = 41  # bytes of labels for each crop: five numbers and a flag, always in host memory
ANSWER_ROWS = 100  # whose features a shard sends along, for re-ranking
DATABASE = 2  # copies of a crop's features on the disk: in SQL and in the snapshot
_HOURS = 730  # a month
_DAY = 86_400


@dataclass(frozen=True)
class Assumed:
    """What is not measured. Sizes in bytes, rates a second, prices in euros an hour.

    disk_price: of a gigabyte and month. network: bytes a second that reach the serving process.
    """

    gpu_memory: float
    gpu_bandwidth: float
    gpu_share: float
    gpu_price: float
    host_memory: float
    host_price: float
    host_cores: int
    crop: float
    disk_price: float
    network: float


@dataclass(frozen=True)
class Measured:
    """Rates of two cores, and where they come from.

    scan: bytes of features that an exact search reads a second. inverted: the part of its time that
    an inverted file of 8-bit codes takes, and recall. embed: crops a second by network.
    """

    scan: float
    inverted: float
    recall: float
    embed: dict[str, float]
    cpu: dict[str, str]


@dataclass(frozen=True)
class Network:
    """A checkpoint's sizes. width: numbers of a lifted vector, in fp16."""

    name: str
    parts: int
    dim: int

    @property
    def bytes(self) -> int:
        """Of one crop in memory, its labels left out."""
        return 2 * (self.parts + 1) * self.dim

    @property
    def codes(self) -> int:
        """Bytes of its codes, which lie beside it on a host without GPU."""
        return (self.parts + 1) * self.dim + 12


def measured() -> Measured:
    """Read the rates from benchmarks/results."""
    scale, recall = _read("scale"), _read("recall")
    (row,) = (r for r in scale["results"] if r["N"] == MEASURED_ROWS and not r["computed"])
    width = 2 * 7 * int(scale["settings"]["dim"])
    (inverted,) = (
        r
        for r in recall["results"]
        if (r["features"], r["N"], r["index"], r["C"]) == ("sampled", MEASURED_ROWS, "IVF-SQ8", 200)
        and r["setting"].startswith("10%")
        and r["modulation"].startswith("the checkpoint")
    )
    networks = {"compact": _read("embed"), "ResNet-50": _read("embed-resnet50")}
    return Measured(
        scan=MEASURED_ROWS * width / row["seconds"]["exhaustive, Q = 1"]["median"],
        inverted=inverted["seconds per query"]["median"]
        / inverted["exhaustive seconds per query"]["median"],
        recall=inverted["recall@10"],
        embed={name: _as_served(file["results"]) for name, file in networks.items()},
        cpu={
            name: file["machine"]["cpu"]
            for name, file in {"search": scale, "recall": recall, **networks}.items()
        },
    )


def _as_served(results: list[dict[str, Any]]) -> float:
    """The best rate in crops a second, with the mirror image where the network has it."""
    rates = [row for row in results if "images per second" in row]
    views = max(row["views"] for row in rates)
    return float(max(r["images per second"]["median"] for r in rates if r["views"] == views))


def tables(rates: Measured, assumed: Assumed) -> str:
    """The tables as Markdown."""
    paper = CMTConfig()
    networks = (
        Network("compact", 6, 128),
        Network("ResNet-50", paper.parts, paper.dim),
    )
    parts = [_inputs(rates, assumed)]
    for network in networks:
        parts.append(f"**{network.name}**: {network.parts} parts of {network.dim} numbers")
        parts.append(_needs(network, rates, assumed))
    parts.append(_takeover(networks, rates, assumed))
    return "\n\n".join(parts) + "\n"


def _inputs(rates: Measured, assumed: Assumed) -> str:
    rows = [
        (
            "exact search, two cores",
            f"{rates.scan / 1e9:.1f} GB of features a second",
            f"scale.json, a million crops, {rates.cpu['search']}",
        ),
        (
            "IVF-SQ8, a tenth of its lists",
            f"{rates.inverted:.2f} of the exact search's time, recall@10 {rates.recall:.3f}",
            f"recall.json, a million crops, {rates.cpu['recall']}",
        ),
        *(
            (
                f"embedding, {name}, two cores",
                f"{rate:,.0f} crops a second",
                f"{'embed' if name == 'compact' else 'embed-resnet50'}.json, {rates.cpu[name]}",
            )
            for name, rate in rates.embed.items()
        ),
        (
            "GPU",
            f"{assumed.gpu_memory / 1e9:.0f} GB, {assumed.gpu_bandwidth / 1e12:.1f} TB a second, of"
            f" which a search gets {assumed.gpu_share:.0%}",
            "**assumed**, not measured",
        ),
        (
            "host",
            f"{assumed.host_cores} cores, {assumed.host_memory / 1e9:.0f} GB; the scan as many "
            "times as fast as two cores as it has pairs of them",
            "**assumed**; memory may be the limit first",
        ),
        ("stored crop", f"{assumed.crop / 1e3:.0f} kB", "**assumed**"),
        (
            "prices",
            f"€{assumed.gpu_price:.2f} an hour for a GPU with its host, €{assumed.host_price:.2f} "
            "for a host without",
            "**assumed**",
        ),
        (
            "disk",
            f"€{assumed.disk_price:.2f} a gigabyte and month, one copy; a bucket is cheaper",
            "**assumed**; traffic and backups not counted",
        ),
        (
            "network of the serving process",
            f"{8 * assumed.network / 1e9:.0f} Gbit a second",
            "**assumed**",
        ),
    ]
    return _table(("input", "value", "from"), rows)


def _needs(network: Network, rates: Measured, assumed: Assumed) -> str:
    host_rate = rates.scan * assumed.host_cores / 2
    gpu_rate = assumed.gpu_bandwidth * assumed.gpu_share
    columns: list[list[str]] = []
    for count in SIZES:
        features = count * network.bytes
        # A tenth stays free: for a search's scratch memory, and for what is deleted or copied.
        gpus = math.ceil(features / (0.9 * assumed.gpu_memory))
        coded = features + count * (network.codes + COLUMNS)
        hosts = math.ceil(coded / (0.9 * assumed.host_memory))
        # An index of a byte a number, beside features and codes.
        indexed = math.ceil((coded + 0.5 * features) / (0.9 * assumed.host_memory))
        shipped = gpus * ANSWER_ROWS * network.bytes
        disk = count * (assumed.crop + DATABASE * 2 * network.parts * network.dim)
        columns.append(
            [
                f"{features / 1e9:,.0f} GB",
                f"{count * COLUMNS / 1e9:,.1f} GB",
                f"{disk / 1e12:,.1f} TB",
                f"€{disk / 1e9 * assumed.disk_price:,.0f}",
                f"{gpus:,}",
                _time(features / gpus / gpu_rate),
                f"€{gpus * assumed.gpu_price * _HOURS:,.0f}",
                f"{hosts:,}",
                _time(features / hosts / host_rate),
                f"€{hosts * assumed.host_price * _HOURS:,.0f}",
                f"{indexed:,}",
                _time(rates.inverted * features / indexed / host_rate),
                f"€{indexed * assumed.host_price * _HOURS:,.0f}",
                f"{shipped / 1e6:,.1f} MB",
                f"{assumed.network / shipped:,.0f}",
                f"{count / rates.embed[network.name] / _DAY:,.1f} days",
            ]
        )
    names = (
        "features in memory",
        "labels in memory",
        "disk: crops and features twice",
        "its cost a month",
        "GPUs, exact search",
        "their latency floor",
        "their cost a month",
        "hosts without GPU, exact search",
        "their latency floor",
        "their cost a month",
        "hosts without GPU, IVF-SQ8",
        "their latency floor",
        "their cost a month",
        "what all GPUs answer to a query",
        "queries a second that the network carries",
        "embedding all once, on two cores",
    )
    rows = [(name, *(column[i] for column in columns)) for i, name in enumerate(names)]
    return _table(("", *(f"10{_superscript(count)} crops" for count in SIZES)), rows)


def _takeover(networks: Iterable[Network], rates: Measured, assumed: Assumed) -> str:
    """How many crops an exact search reads in a time, in one GPU or host."""
    host_rate = rates.scan * assumed.host_cores / 2
    gpu_rate = assumed.gpu_bandwidth * assumed.gpu_share
    rows = []
    for network in networks:
        fits = 0.9 * assumed.gpu_memory / network.bytes
        for name, rate in (("two cores", rates.scan), ("host", host_rate), ("GPU", gpu_rate)):
            most = rate / network.bytes
            times = (0.01 * most, 0.1 * most, most, 0.1 * 2 * most)
            rows.append((f"{network.name}, {name}", *map(_crops, times)))
        rows.append((f"{network.name}, fits a GPU", "", _crops(fits), "", _crops(2 * fits)))
    columns = ("exact search of as many crops", "in 10 ms", "in 100 ms", "in 1 s")
    return _table((*columns, "in 100 ms with 8-bit features"), rows)


def _read(name: str) -> dict[str, Any]:
    file: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return file


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:,.0f} ms"


def _crops(count: float) -> str:
    return f"{count / 1e6:,.1f} million" if count >= 1e6 else f"{count:,.0f}"


def _superscript(count: int) -> str:
    return str(round(math.log10(count))).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def main(arguments: Sequence[str] | None = None) -> str:
    """The tables for the assumptions on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options: dict[str, tuple[float, str]] = {
        "gpu_memory": (141e9, "bytes of a GPU"),
        "gpu_bandwidth": (4.8e12, "bytes that a GPU reads a second, as its maker says"),
        "gpu_share": (0.8, "the part of it that a search gets"),
        "gpu_price": (4.0, "euros an hour for a GPU with its host"),
        "host_memory": (256e9, "bytes of a host without GPU"),
        "host_price": (1.5, "euros an hour for a host without GPU"),
        "crop": (20e3, "bytes of a stored crop"),
        "disk_price": (0.08, "euros for a gigabyte and month of disk"),
        "network": (1.25e9, "bytes a second that reach the serving process"),
    }
    for name, (value, text) in options.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=value, help=f"{text} ({value:g})"
        )
    parser.add_argument("--host-cores", type=int, default=32, help="cores of such a host (32)")
    return tables(measured(), Assumed(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    print(main(), end="")
