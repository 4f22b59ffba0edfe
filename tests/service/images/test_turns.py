"""Whose job is next."""

from __future__ import annotations

import pytest

from service.images.turns import Share, Turns


def names(turns: Turns[str], count: int) -> list[str]:
    """The next jobs, each done before the next is taken."""
    taken = []
    for _ in range(count):
        found = turns.get()
        assert found is not None
        taken.append(found[1])
        turns.done(found[0], 0.0)
    return taken


def test_owners_take_turns_and_so_do_the_requests_of_each() -> None:
    turns: Turns[str] = Turns(2)
    first, second, other = Share("a"), Share("a"), Share("b")
    for share, jobs in (first, "123456"), (second, "xyz"), (other, "BCD"):
        for job in jobs:
            turns.put(share, job)
    assert "".join(names(turns, 12)) == "1BxC2Dy3z456"


@pytest.mark.parametrize("used", [0.0, 10.0])
def test_a_request_that_is_long_or_unknown_leaves_a_place_to_others(used: float) -> None:
    turns: Turns[str] = Turns(3)
    long, short = Share("a", used=used), Share("b", used=0.1)
    for _ in range(5):
        turns.put(long, "long")
    assert [turns.get(), turns.get()] == [(long, "long")] * 2
    turns.put(short, "short")
    assert turns.get() == (short, "short")
    turns.done(long, 0.0)
    assert turns.get() == (long, "long")


def test_a_quick_request_takes_all_places() -> None:
    turns: Turns[str] = Turns(3)
    share = Share("a", used=0.1)
    for _ in range(3):
        turns.put(share, "quick")
    assert [turns.get(), turns.get(), turns.get()] == [(share, "quick")] * 3


def test_a_job_that_is_removed_is_not_given() -> None:
    turns: Turns[str] = Turns(1)
    share, other = Share("a"), Share("a")
    for job in ("1", "2"):
        turns.put(share, job)
    turns.put(other, "x")
    turns.remove(share, "1")
    turns.remove(other, "x")
    turns.remove(other, "x")
    assert names(turns, 1) == ["2"]


def test_once_closed_nothing_is_given_or_taken() -> None:
    turns: Turns[str] = Turns(1)
    share = Share("a")
    turns.put(share, "1")
    assert turns.close() == ["1"]
    assert turns.get() is None
    with pytest.raises(RuntimeError):
        turns.put(share, "2")


def test_a_job_of_its_own_thread_takes_a_place_only_where_it_need_not_wait() -> None:
    turns: Turns[str] = Turns(1)
    share, other = Share("a"), Share("b")
    assert turns.take(share)
    assert not turns.take(other)
    turns.put(other, "waits")
    turns.done(share, 0.5)
    assert (share.running, share.used) == (0, 0.5)
    assert not turns.take(share)  # the job that waits comes first
    assert names(turns, 1) == ["waits"]
    assert turns.take(other)
    turns.close()
    assert not turns.take(share)
