"""Short work goes before long work where both compute on all cores.

Long work runs in slices of some milliseconds and calls `give_way` between them: it waits there
while short work is in progress, and ends where nobody wants its result any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# So long it waits before a slice, in seconds: it ends however many short ones follow each other.
_PATIENCE = 0.01

_short = 0  # how many are in progress
_changed = threading.Condition()
# Of the work in this context, which threads that share it copy.
_long = ContextVar("long", default=False)
_wanted: ContextVar[Callable[[], bool]] = ContextVar("wanted", default=lambda: True)


class Abandoned(Exception):  # noqa: N818
    """Nobody waits for this work any more."""


@contextmanager
def turn(*, long: bool) -> Iterator[None]:
    """Work that goes first, or that calls `give_way` between its slices."""
    if long:
        token = _long.set(True)
        try:
            yield
        finally:
            _long.reset(token)
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


@contextmanager
def while_wanted(wanted: Callable[[], bool]) -> Iterator[None]:
    """Long work in this context ends at its next slice once this is false. wanted: thread-safe."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def give_way() -> None:
    """Wait for short work, if this is long. Raises Abandoned where it is not wanted any more."""
    if not _long.get():
        return
    if _short:
        with _changed:
            _changed.wait_for(lambda: not _short, _PATIENCE)
    if not _wanted.get()():
        raise Abandoned


def _count(more: int) -> None:
    global _short
    with _changed:
        _short += more
        if not _short:
            _changed.notify_all()
