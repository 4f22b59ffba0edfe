"""This checkout's service beside that of another commit, in one run.

    python -m scripts.against_commit COMMIT [--json FILE]

Each serves with its own code, and its own `cmt enroll` fills its gallery with the same crops. Then
both are loaded by the same generator, in turn: first this checkout, then the commit, round after
round. Both use this environment and this checkout's checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import httpx
import numpy as np
from PIL import Image
from rich.table import Table

from model.atomic_file import write_whole
from model.benchmark import Spread
from model.benchmark_table import CMT
from model.machine import machine
from model.terminal import Console
from service.bench.crops import image_files
from service.bench.data import numbers
from service.bench.serving.figures import cores, corrected_rate
from service.bench.serving.load import HOST, measure
from service.bench.serving.rivals import Route, Server, started
from service.kit.text import counted

_ROOT = Path(__file__).parents[1]
_CHECKPOINT = _ROOT / "examples" / "compact.safetensors"
_QUERIES, _CROPS = _ROOT / "examples" / "queries", _ROOT / "examples" / "gallery"
_COLUMNS = ("what", "unit", "before", "after", "after / before")
_LONE = 100  # queries, one after the other


@dataclass
class Side:
    """A tree of source code, the data folder of its service, and what was measured of it."""

    tree: Path
    data: Path
    measured: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    @property
    def cmt(self) -> list[str]:
        """The beginning of a command that runs this tree's code, whatever the current folder."""
        return ["env", "PYTHONSAFEPATH=1", f"PYTHONPATH={self.tree}", *CMT]

    def note(self, what: str, unit: str, value: float) -> None:
        """Keep a round's figure."""
        self.measured.setdefault((what, unit), []).append(value)

    @contextmanager
    def served(self, queries: Sequence[Path], folder: Path) -> Iterator[int]:
        """Run the service → its port; how long it took to answer a first query is noted."""
        options = {"--checkpoint": _CHECKPOINT, "--data-dir": self.data, "--host": HOST}
        words = [*self.cmt, "serve", *(str(part) for one in options.items() for part in one)]
        server = Server("", (*words, "--port"), (Route("POST /query", "/query", queries),))
        begun = time.perf_counter()
        with started(server, folder / "log") as port:
            self.note("cmt serve, to the first answer", "s", time.perf_counter() - begun)
            yield port


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit")
    parser.add_argument("--items", type=int, default=10_000, help="of the gallery")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=4, help="of every load, after half of it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(options.commit, folder / "tree")
        before = Side(folder / "tree", folder / "before")
        after = Side(_ROOT, folder / "after")
        crops = different(image_files(_CROPS), options.items, folder / "crops")
        for side in (after, before):
            _fill(side, crops, folder)
        for _ in range(options.rounds):
            for side in (after, before):
                _load(side, numbers(options.clients), options.seconds, folder)
    rows = [
        (what, unit, then, now, [n / t for n, t in zip(now, then, strict=True)])
        for (what, unit), now in after.measured.items()
        for then in [before.measured[what, unit]]
    ]
    table = Table(*_COLUMNS)
    for what, unit, *spreads in rows:
        table.add_row(what, unit, *(str(Spread.of(values)) for values in spreads))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.json is not None:
        given = {name: value for name, value in vars(options).items() if name != "json"}
        report = {
            "command": "python -m scripts.against_commit "
            + " ".join([given.pop("commit"), *(f"--{name} {v}" for name, v in given.items())]),
            "machine": machine(),
            "results": [
                dict(zip(_COLUMNS, (what, unit, *map(_plain, spreads)), strict=True))
                for what, unit, *spreads in rows
            ],
        }
        text = json.dumps(report, indent=2, ensure_ascii=False)
        write_whole(options.json, f"{text}\n".encode())


def _plain(values: Sequence[float]) -> dict[str, float]:
    return asdict(Spread.of(values))


def unpack(commit: str, tree: Path) -> None:
    """Write the files of a commit. Ends with git's sentence where it knows none such."""
    archive = subprocess.run(
        ["git", "-C", str(_ROOT), "archive", commit], capture_output=True, check=False
    )
    if archive.returncode:
        raise SystemExit(f"git: {archive.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(tree, filter="data")


def different(images: Sequence[Path], count: int, folder: Path) -> list[Path]:
    """So many crops, no two of them equal: the images again and again, each with some noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    files = []
    for place, image in enumerate(islice(cycle(images), count)):
        with Image.open(image) as opened:
            pixels = np.asarray(opened.convert("RGB"), np.int16)
        noisy = np.clip(pixels + random.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)
        files.append(folder / f"{place:06}.jpg")
        Image.fromarray(noisy).save(files[-1], quality=90)
    return files


def _fill(side: Side, crops: Sequence[Path], folder: Path) -> None:
    """Enroll the crops by the side's own command."""
    with side.served(image_files(_QUERIES), folder) as port:
        side.measured.clear()  # the first start converts the network
        words = [*side.cmt, "enroll", str(crops[0].parent), "--url", f"http://{HOST}:{port}"]
        begun = time.perf_counter()
        enrolled = subprocess.run(words, capture_output=True, text=True)
        taken = time.perf_counter() - begun
    if enrolled.returncode:
        raise SystemExit(f"cmt enroll of {side.tree}: {enrolled.stderr.strip()}")
    side.note("cmt enroll", "crops/s", len(crops) / taken)


def _load(side: Side, clients: Sequence[int], seconds: float, folder: Path) -> None:
    """All loads once. Enrollments come last: they make the gallery grow."""
    queries, crops = image_files(_QUERIES), image_files(_CROPS)
    loads = ("/query", queries), ("/gallery", crops)
    with side.served(queries, folder) as port:
        side.note("a lone query, rerank=none", "ms, median", _lone(port, queries))
        for path, files in loads:
            for count in clients:
                load = measure(port, path, files, count, seconds)
                what = f"POST {path}, {counted(count, 'client')}"
                rate = corrected_rate(len(load.latencies), load.seconds, load.cpu_seconds, cores())
                side.note(what, "requests/s", rate)


def _lone(port: int, queries: Sequence[Path]) -> float:
    """Milliseconds until one client has its answer, without re-ranking: the median."""
    taken = []
    with httpx.Client(base_url=f"http://{HOST}:{port}", trust_env=False) as http:
        for query in islice(cycle(queries), _LONE):
            files = {"image": query.read_bytes()}
            begun = time.perf_counter()
            http.post("/query", files=files, data={"rerank": "none"}).raise_for_status()
            taken.append(time.perf_counter() - begun)
    return 1e3 * median(taken)


if __name__ == "__main__":
    main()
