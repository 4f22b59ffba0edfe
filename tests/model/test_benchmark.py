"""Timing two sides in turn."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from model.benchmark import Spread, compare


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds on a clock that goes on when a call says so."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def taking(clock: list[float], *seconds: float) -> tuple[Callable[[], None], list[float]]:
    """A call that takes these times, one after the other, and the last one from then on."""
    taken: list[float] = []

    def call() -> None:
        taken.append(seconds[min(len(taken), len(seconds) - 1)])
        clock[0] += taken[-1]

    return call, taken


def test_a_short_call_is_repeated_and_its_first_left_out(clock: list[float]) -> None:
    ours, mine = taking(clock, 0.125, 0.0625)
    theirs, yours = taking(clock, 2.0)
    comparison = compare(ours, theirs, 1, theirs_times=3)
    assert (len(mine), len(yours)) == (3, 1)
    assert comparison.ours == Spread(0.0625, 0.0625, 0.0625)
    assert comparison.theirs == Spread(6.0, 6.0, 6.0)
    assert comparison.ratio == Spread(96.0, 96.0, 96.0)


def test_every_round_has_a_ratio_of_its_own(clock: list[float]) -> None:
    ours, _ = taking(clock, 1.0, 2.0, 4.0)
    theirs, _ = taking(clock, 8.0)
    comparison = compare(ours, theirs, 3)
    assert comparison.ratio == Spread(4.0, 2.0, 8.0)
