"""Rates: what is one, how many requests it lets through, and on which clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from service.auth.rate_limit import Limit, Rates, checked_rate, parsed_rate
from service.errors import DatabaseUnavailable, RateLimited, ServiceError


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("50/second", [(50, 1)]),
        ("7 per 2 minutes", [(7, 120)]),
        ("10/Second;500/hour, 2000 per day", [(10, 1), (500, 3600), (2000, 86_400)]),
    ],
)
def test_a_rate_may_have_several_limits(text: str, limits: list[tuple[int, int]]) -> None:
    assert list(parsed_rate(text)) == limits


@pytest.mark.parametrize(
    "text",
    ["", "50", "/second", "50/fortnight", "-1/second", "1.5/second", "0/second", "3/0 minutes",
     "10/second;", "10/second;0/hour", "10/second 5/hour", "9999999999/second", "nan/second"],
)  # fmt: skip
def test_what_is_no_rate_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="rate"):
        checked_rate(text)


class Clocks:
    """The clocks of the machine, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monotonic = self.wall = 1_000_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.monotonic)
        monkeypatch.setattr(time, "time", lambda: self.wall)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


def test_without_the_database_of_all_a_replica_counts_by_itself(clocks: Clocks) -> None:
    answers: list[float | ServiceError] = [0, 30, DatabaseUnavailable("it is away")]

    async def shared(who: str, rate: str, limits: Sequence[Limit]) -> float:
        assert (who, rate, limits) == ("desk", "2/minute", ((2, 60),))
        answer = answers.pop(0)
        if isinstance(answer, ServiceError):
            raise answer
        return answer

    rates = Rates("2/minute", shared)
    assert [refused(rates) for _ in range(4)] == [0, 30, 30, 30]  # all but two without asking
    clocks.monotonic += 30
    answers.append(DatabaseUnavailable("it is away"))
    assert [refused(rates) for _ in range(2)] == [0, 30]


def refused(rates: Rates, who: str = "desk", rate: str | None = None) -> int:
    """The seconds that a refused request is told to wait; 0 for one that is let through."""
    try:
        asyncio.run(rates.count(who, rate))
    except RateLimited as error:
        return int(error.headers["Retry-After"])
    return 0


def test_setting_the_clock_changes_no_rate(clocks: Clocks) -> None:
    rates = Rates("2/10 seconds")
    assert [refused(rates) for _ in range(3)] == [0, 0, 10]
    clocks.wall -= 7200
    clocks.monotonic += 4
    assert refused(rates) == 6
    clocks.wall += 30 * 86_400
    assert refused(rates) == 6
    clocks.monotonic += 6
    assert [refused(rates) for _ in range(3)] == [0, 0, 10]


def test_every_limit_holds_and_the_longest_wait_is_told(clocks: Clocks) -> None:
    rates = Rates(None)
    several = "2/second;3/minute"
    assert [refused(rates, rate=several) for _ in range(3)] == [0, 0, 1]
    clocks.monotonic += 1
    assert [refused(rates, rate=several) for _ in range(2)] == [0, 59]
    clocks.monotonic += 59
    assert [refused(rates, rate=several) for _ in range(3)] == [0, 0, 1]
    assert refused(rates, "other", several) == 0


def test_callers_that_come_no_more_are_forgotten(clocks: Clocks) -> None:
    rates = Rates("1/minute")
    for number in range(10_000):
        clocks.monotonic += 1
        assert refused(rates, f"address:{number}") == 0
    assert len(rates._windows) < 5000
    assert refused(rates, "address:9999") == 60
