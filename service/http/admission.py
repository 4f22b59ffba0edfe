"""How much may be in the service at once: uploads, and the bytes of their bodies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Overloaded


class Admission:
    """Bounds on what is received and worked on; beyond them a request is refused at once.

    receiving: uploads whose body arrives, so that slow clients cannot hold the others up.
    working: uploads whose body has arrived. bytes: of all these bodies. Used on one event loop.
    """

    def __init__(self, *, receiving: int, working: int, bytes: int) -> None:
        self._receiving, self._working, self._bytes = receiving, working, bytes
        self.receiving = self.working = self.bytes = 0

    @contextmanager
    def receive(self) -> Iterator[Body]:
        """A place to read a body in. Raises Overloaded."""
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
    """One body that is admitted."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.held = 0
        self.arrived = False

    def grow(self, count: int) -> None:
        """So many bytes more have come. Raises Overloaded."""
        self._admission._take(count)
        self.held += count

    def arrive(self) -> None:
        """It is whole. Raises Overloaded where too many others are worked on already."""
        self._admission._arrive()
        self.arrived = True


def _overloaded(reason: str) -> Overloaded:
    return Overloaded(f"{reason}; try again in a second", headers={"Retry-After": "1"})
