"""A lock that readers share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Many readers or one writer; a waiting writer lets no new reader in."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._readers = 0
        self._idle = threading.Condition()

    @contextmanager
    def shared(self) -> Iterator[None]:
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
        with self._turn:
            with self._idle:
                self._idle.wait_for(lambda: self._readers == 0)
            yield
