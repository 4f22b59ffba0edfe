"""Bounds on the uploads in the service at the same time, and on the bytes of their bodies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Overloaded


class Admission:
    """Bounds on what is received and worked on; beyond them a request is refused immediately.

    receiving: uploads whose body is arriving, so that slow clients cannot hold up the others.
    working: uploads whose body has arrived. bytes: of all these bodies. Used on one event loop.
    """

    def __init__(self, *, receiving: int, working: int, bytes: int) -> None:
        self._receiving, self._working, self._bytes = receiving, working, bytes
        self.receiving = self.working = self.bytes = 0

    @contextmanager
    def receive(self) -> Iterator[Body]:
        """Admit one upload, whose body is read in this context. Raises Overloaded."""
        self._refuse_where(self.receiving >= self._receiving or self.working >= self._working)
        self.receiving += 1
        body = Body(self)
        try:
            yield body
        finally:
            self.bytes -= body.held
            if not body.arrived:
                self.receiving -= 1
            else:
                self.working -= 1

    def _refuse_where(self, full: bool) -> None:
        if full:
            raise _overloaded("the service has as many uploads as it can queue")

    def _take(self, count: int) -> None:
        if self.bytes + count > self._bytes:
            raise _overloaded("the service holds as many bytes of uploads as it may")
        self.bytes += count

    def _arrive(self) -> None:
        self._refuse_where(self.working >= self._working)
        self.receiving -= 1
        self.working += 1


class Body:
    """The body of one admitted upload."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.held = 0
        self.arrived = False

    def grow(self, count: int) -> None:
        """Count `count` more bytes that have arrived. Raises Overloaded."""
        self._admission._take(count)
        self.held += count

    def arrive(self) -> None:
        """Mark the body as complete. Raises Overloaded where too many others are worked on."""
        self._admission._arrive()
        self.arrived = True


def _overloaded(reason: str) -> Overloaded:
    return Overloaded(f"{reason}; try again in a second", headers={"Retry-After": "1"})
