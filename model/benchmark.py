"""What every benchmark shares: timing two sides in turn, a table, and JSON with the machine."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from model.atomic_file import write_whole
from model.machine import machine
from model.terminal import Console, say

_ROUND = 0.25  # seconds that one side of a comparison gets in turn, or one call that is longer


@dataclass(frozen=True)
class Spread:
    """Seconds of one side, or the ratio of two, over the rounds of a benchmark."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, least and most of the values, one for each round."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.least:.4g}–{self.most:.4g})"


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of both sides; `ratio` says how many times faster ours is."""

    ours: Spread
    theirs: Spread
    ratio: Spread


def seconds(call: Callable[[], object]) -> float:
    """Time one call in seconds, until the GPU's queue is empty too."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    *,
    theirs_times: float = 1.0,
) -> Comparison:
    """Time both sides in turn, so that a busy machine slows both; call each once before.

    rounds: how often each side is measured; a short call is repeated within a round. theirs_times:
    how often their call would have to run to do the work of ours.
    """
    mine, yours = [], []
    for _ in range(rounds):
        mine.append(_repeated(ours))
        yours.append(_repeated(theirs) * theirs_times)
    ratios = [y / m for m, y in zip(mine, yours, strict=True)]
    return Comparison(Spread.of(mine), Spread.of(yours), Spread.of(ratios))


def _repeated(call: Callable[[], object]) -> float:
    """Mean seconds of a call, over as many as fill `_ROUND`.

    The first counts only where it is the only one: threads of the other side still wait for work
    for a while and slow it down.
    """
    taken = [seconds(call)]
    while sum(taken) < _ROUND:
        taken.append(seconds(call))
    return statistics.fmean(taken[1:] or taken)


def publish(
    name: str,
    settings: dict[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    results: Sequence[dict[str, Any]],
    path: Path | None,
) -> None:
    """Print the table; write settings, results and the machine's facts to `path` as JSON."""
    table = Table(*columns, title=f"cmt bench {name}")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": name,
        "command": f"cmt bench {name} " + " ".join(f"--{k} {v}" for k, v in settings.items()),
        "settings": settings,
        "machine": machine(),
        "results": list(results),
    }
    write_whole(path, json.dumps(report, indent=2, ensure_ascii=False, default=_plain) + "\n")
    say(f"written to {path}")


def _plain(value: object) -> object:
    if isinstance(value, Spread | Comparison):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
