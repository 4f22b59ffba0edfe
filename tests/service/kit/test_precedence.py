"""Short work goes first, long work ends all the same, and what nobody wants ends at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest

from service.kit import precedence
from service.kit.precedence import Abandoned, give_way, turn, while_wanted


def slices(count: int, log: list[str]) -> None:
    with turn(long=True):
        for _ in range(count):
            give_way()
            log.append("slice")


def test_long_work_begins_no_slice_while_short_work_is_in_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precedence, "_PATIENCE", 60)
    log: list[str] = []
    with ThreadPoolExecutor() as threads:
        with turn(long=False):
            with turn(long=False):
                work = threads.submit(slices, 2, log)
            log.append("short")
        work.result(60)
    assert log == ["short", "slice", "slice"]


def test_long_work_ends_even_if_short_work_does_not() -> None:
    log: list[str] = []
    with turn(long=False), ThreadPoolExecutor() as threads:
        threads.submit(slices, 3, log).result(60)
    assert log == ["slice"] * 3


def test_short_work_waits_for_nobody() -> None:
    with turn(long=False):
        with turn(long=True):
            give_way()
        give_way()


def test_what_nobody_wants_ends_at_its_next_slice_in_every_thread() -> None:
    wanted = threading.Event()
    wanted.set()
    with while_wanted(wanted.is_set), turn(long=True), ThreadPoolExecutor() as threads:
        give_way()
        wanted.clear()
        helping = threads.submit(copy_context().run, give_way)
        with pytest.raises(Abandoned):
            give_way()
        with pytest.raises(Abandoned):
            helping.result(60)
    give_way()
