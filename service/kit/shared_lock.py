"""A readers-writer lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Many readers or one writer; while a writer waits, new readers wait behind it."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._readers = 0
        self._idle = threading.Condition()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock as a reader."""
        with self._turn, self._idle:
            self._readers += 1
        try:
            yield
        finally:
            with self._idle:
                self._readers -= 1
                self._idle.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock as the only one."""
        with self._turn:
            with self._idle:
                self._idle.wait_for(lambda: self._readers == 0)
            yield
