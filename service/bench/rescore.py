"""Modulated ranking as the service does it, against the paper's way: modulate, then measure."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

from model import Modulation
from model.benchmark import Comparison, compare, publish
from model.benchmark_table import Headline, as_fast, duration
from model.device import DEVICES, chosen_device
from model.outputs import ResultsFile
from service.bench.data import (
    CHECKPOINT,
    STATISTICS,
    Checkpoint,
    Source,
    Statistics,
    numbers,
)
from service.bench.engine import Engine, Positions
from service.bench.paper import modulated_distances

QUICK = ("--sizes", "10000,100000", "--queries", "1,32", "--rounds", "2")
_TOP = 20
# The paper's way is a loop over queries, so its time is measured on this many and scaled.
_PAPER_QUERIES = 2
_FP16 = "fp16 features alone"


Search = Callable[[Tensor, Modulation, int], list[Positions]]


class Way(NamedTuple):
    """A way to compute squared distances: x Q×P×D, y N×P×D → Q×N, `rows` gallery rows at once."""

    name: str
    squared: Callable[[Tensor, Tensor, Modulation], Tensor]
    rows: int


def rescore(
    sizes: Annotated[str, typer.Option(help="Gallery sizes N, comma-separated.")] = (
        "10000,100000"
    ),
    queries: Annotated[str, typer.Option(help="Query batches Q, comma-separated.")] = "1,32,256",
    dim: Annotated[
        int,
        typer.Option(help="Channels D per part; more than the checkpoint's: draws side by side."),
    ] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="How often both sides run, in turn.")] = 3,
    statistics: Statistics = STATISTICS,
    checkpoint: Checkpoint = CHECKPOINT,
    device: Annotated[str, typer.Option(help=f"{DEVICES}.")] = "cpu",
    json: ResultsFile = None,
) -> None:
    """Time modulated ranking: the service's exhaustive search against modulating the gallery.

    The search scans or multiplies all lifted rows ("closed form") and computes the distances of
    the best again, until the nearest are certain ("proven", as the service does). For few queries a
    CPU reads int8 codes first: the share of rows that these leave is shown, and the time against a
    search without them. N crops take about 9·P·D bytes each: 14 GB for a million of 1,536 numbers.

    Example: cmt bench rescore --sizes 10000 --queries 1,32
    """
    device = chosen_device(device)
    settings = {
        "sizes": sizes,
        "queries": queries,
        "dim": dim,
        "rounds": rounds,
        "statistics": str(statistics),
        "checkpoint": str(checkpoint),
        "device": device,
    }
    source = Source.load(statistics, checkpoint)
    batches = numbers(queries)
    rows, results = [], []
    for count in numbers(sizes):
        data = source.sample_wide(count, max(batches), dim)
        engine = Engine(data.gallery, device)
        y = data.gallery.to(device).float()
        queries_of, modulation_of = data.queries, data.modulation
        del data  # frees the fp16 copy: `y` is fp32
        for batch in batches:
            x = queries_of[:batch]
            modulation = Modulation(*(p[:batch] for p in modulation_of))
            eager, *others = _ways_of_the_paper()
            sides: list[tuple[str, Search, Way]] = [
                ("closed form", engine.scored, eager),
                *(("proven", engine.exhaustive, way) for way in (eager, *others)),
            ]
            for ours, search, way in sides:
                time, error = _measure(way, search, x, y, modulation, rounds)
                results.append(
                    {
                        "N": count,
                        "Q": batch,
                        "ours": ours,
                        "against": way.name,
                        "seconds": time,
                        "error": error,
                    }
                )
                times = (time.ours, time.theirs, time.ratio)
                rows.append((f"{count:,}", batch, ours, way.name, *times, f"{error:.1e}", ""))
            top = min(_TOP, count)
            if (left := engine.possible(x, modulation, top)) is not None:
                time, error = _against_fp16(engine, x, modulation, top, rounds)
                results.append(
                    {
                        "N": count,
                        "Q": batch,
                        "ours": "proven",
                        "against": _FP16,
                        "seconds": time,
                        "error": error,
                        "rows left": left,
                    }
                )
                times = (time.ours, time.theirs, time.ratio)
                rows.append(
                    (f"{count:,}", batch, "proven", _FP16, *times, f"{error:.1e}", f"{left:.2%}")
                )
    columns = (
        *("N", "Q", "ours", "against", "ours, s", "theirs, s"),
        *("times faster", "largest difference", "rows left by codes"),
    )
    publish("rescore", settings, columns, rows, results, json)


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`: the proven ranking, which serves."""
    for result in report["results"]:
        if result["ours"] == "proven":
            yield Headline(
                f"exact modulated ranking, {result['N']:,} crops, Q = {result['Q']}",
                duration(result["seconds"]["ours"]),
                result["against"],
                duration(result["seconds"]["theirs"]),
                as_fast(result["seconds"]["ratio"]),
            )


def _measure(
    way: Way, ranked: Search, x: Tensor, y: Tensor, modulation: Modulation, rounds: int
) -> tuple[Comparison, float]:
    """Both sides rank the whole gallery → their times, and how much their best distances differ."""
    few = min(len(x), _PAPER_QUERIES)
    top = min(_TOP, len(y))
    there = [
        (x[q : q + 1].to(y.device), Modulation(*(p[q : q + 1].to(y.device) for p in modulation)))
        for q in range(few)
    ]

    def search() -> list[Positions]:
        return ranked(x, modulation, top)

    def paper() -> Tensor:
        best = []
        for one, its_own in there:
            blocks = [
                way.squared(one, y[start : start + way.rows], its_own)[0]
                for start in range(0, len(y), way.rows)
            ]
            best.append(torch.cat(blocks).topk(top, largest=False).values)
        return torch.stack(best)

    with torch.inference_mode():
        expected = paper()
        given = torch.stack(
            [
                modulated_distances(one, y[torch.from_numpy(found).to(y.device)], its_own)[0]
                for (one, its_own), found in zip(there, search(), strict=False)
            ]
        )
        time = compare(search, paper, rounds, theirs_times=len(x) / few)
    return time, float(((given - expected).abs() / expected).max())


def _against_fp16(
    engine: Engine, x: Tensor, modulation: Modulation, top: int, rounds: int
) -> tuple[Comparison, float]:
    """The search as it is against that of the fp16 features alone → the share that differs."""

    def search() -> list[Positions]:
        return engine.exhaustive(x, modulation, top)

    def without() -> list[Positions]:
        return engine.exhaustive_without_codes(x, modulation, top)

    with torch.inference_mode():
        differing = float((np.stack(search()) != np.stack(without())).mean())
        return compare(search, without, rounds), differing


def _ways_of_the_paper() -> list[Way]:
    """Obvious implementations: all at once, in blocks that stay in the caches, or compiled."""
    ways = [
        Way("eager", modulated_distances, 100_000),  # more does not fit, and is no faster
        Way("eager, blocks of 512", modulated_distances, 512),
    ]
    if shutil.which("g++") or torch.cuda.is_available():
        ways.append(Way("torch.compile", torch.compile(modulated_distances), 100_000))
    return ways
