"""Modulated ranking by the closed form, against the paper's way: modulate, then measure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from model import Modulation, lift, modulate, project
from model.benchmark import Comparison, compare, publish
from service.bench.data import features

_TOP = 20
_LIFT_ROWS = 16_384
# The paper's way is a loop over queries, so its time is measured on this many and scaled.
_PAPER_QUERIES = 2


class Way(NamedTuple):
    """A way to compute x Q×P×D, y N×P×D → Q×N squared distances, so many gallery rows at once."""

    name: str
    squared: Callable[[Tensor, Tensor, Modulation], Tensor]
    rows: int


def rescore(
    sizes: Annotated[str, typer.Option(help="Gallery sizes N, comma-separated.")] = (
        "10000,100000,1000000"
    ),
    queries: Annotated[str, typer.Option(help="Query batches Q, comma-separated.")] = "1,32,256",
    parts: Annotated[int, typer.Option(help="Parts P.")] = 6,
    dim: Annotated[int, typer.Option(help="Channels D per part.")] = 256,
    rounds: Annotated[int, typer.Option(help="How often both sides run, in turn.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
) -> None:
    """Time modulated ranking: one matrix product against modulating the gallery per query.

    Example: cmt bench rescore --sizes 10000 --queries 1,32
    """
    settings = {
        "sizes": sizes,
        "queries": queries,
        "parts": parts,
        "dim": dim,
        "rounds": rounds,
        "device": device,
    }
    rows, results = [], []
    for count in map(int, sizes.split(",")):
        batches = [int(q) for q in queries.split(",")]
        data = features(count, max(batches), parts, dim)
        y = data.gallery.to(device).float()
        z = torch.empty(count, (parts + 1) * dim, device=device)
        for start in range(0, count, _LIFT_ROWS):
            z[start : start + _LIFT_ROWS] = lift(y[start : start + _LIFT_ROWS])
        for batch in batches:
            x = data.queries[:batch].to(device)
            modulation = Modulation(*(p[:batch].to(device) for p in data.modulation))
            for way in _ways_of_the_paper():
                time, error = _measure(way, x, y, z, modulation, rounds)
                results.append(
                    {"N": count, "Q": batch, "against": way.name, "seconds": time, "error": error}
                )
                times = (time.ours, time.theirs, time.ratio)
                rows.append((f"{count:,}", batch, way.name, *times, f"{error:.1e}"))
    columns = ("N", "Q", "against", "ours, s", "theirs, s", "times faster", "largest difference")
    publish("rescore", settings, columns, rows, results, json)


def _measure(
    way: Way, x: Tensor, y: Tensor, z: Tensor, modulation: Modulation, rounds: int
) -> tuple[Comparison, float]:
    """Both sides rank the whole gallery → their times, and how much their best distances differ."""
    few = min(len(x), _PAPER_QUERIES)
    top = min(_TOP, len(y))

    def closed_form() -> Tensor:
        w, c = project(x, modulation)
        return torch.addmm(c[:, None], w, z.T, alpha=-1).topk(top, largest=False).values

    def paper() -> Tensor:
        best = []
        for q in range(few):
            one = Modulation(*(p[q : q + 1] for p in modulation))
            blocks = [
                way.squared(x[q : q + 1], y[start : start + way.rows], one)[0]
                for start in range(0, len(y), way.rows)
            ]
            best.append(torch.cat(blocks).topk(top, largest=False).values)
        return torch.stack(best)

    with torch.inference_mode():
        expected, given = paper(), closed_form()[:few]
        time = compare(closed_form, paper, rounds, theirs_times=len(x) / few)
    return time, float(((given - expected).abs() / expected).max())


def _ways_of_the_paper() -> list[Way]:
    """What somebody may write: all at once, in blocks that stay in the caches, or compiled."""
    ways = [
        Way("eager", _modulate_then_measure, 100_000),  # more does not fit, and is no faster
        Way("eager, blocks of 512", _modulate_then_measure, 512),
    ]
    if shutil.which("g++") or torch.cuda.is_available():
        ways.append(Way("torch.compile", torch.compile(_modulate_then_measure), 100_000))
    return ways


def _modulate_then_measure(x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
    """Equation (13), then the squared Euclidean distance: Q×N."""
    return (x[:, None] - modulate(y, modulation)).square().sum((2, 3))
