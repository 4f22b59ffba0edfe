"""Bounds on the uploads in the service at the same time, and on the bytes of their bodies.

How many may wait follows from how fast they are answered, too: who says how long he waits is
refused at once where those before him will take longer.

Refusing takes time as well, of the event loop that the accepted uploads share. A crowd that comes
again as soon as it is refused would take all of it: beyond a burst, refusals are given one by one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Overloaded

_FULL = "the service has as many uploads as it can queue"
_RECENT = 0.1  # what the last answer counts for in the pace
# A refusal takes about a millisecond. So many are given at once, then one in so many seconds, and
# nobody waits longer for his.
_BURST, _APART, _LONGEST = 100, 0.005, 2.0


class Admission:
    """Bounds on what is received and worked on; beyond them a request is refused immediately.

    receiving: uploads whose body is arriving, so that slow clients cannot hold up the others.
    working: uploads whose body has arrived. bytes: of all these bodies. Used on one event loop.
    """

    def __init__(self, *, receiving: int, working: int, bytes: int) -> None:
        self._receiving, self._working, self._bytes = receiving, working, bytes
        self.receiving = self.working = self.bytes = 0
        self.pace = 0.0
        """Seconds from one answer to the next while uploads are worked on, of late."""
        self._answered = 0.0
        self._refused = -math.inf

    def before_refusal(self, now: float) -> float:
        """Seconds that a refusal at this moment has to wait, so that the accepted get on."""
        self._refused = max(self._refused, now - _BURST * _APART) + _APART
        self._refused = min(self._refused, now + _LONGEST)
        return max(0.0, self._refused - now)

    @contextmanager
    def receive(self, within: float | None = None) -> Iterator[Body]:
        """Admit one upload, whose body is read in this context. Raises Overloaded.

        within: seconds that its sender waits for the answer.
        """
        if (refusal := self.refusal()) is not None:
            raise refusal
        self._refuse_late(within)
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
                self._note_answer(body.arrived_at)

    def refusal(self) -> Overloaded | None:
        """Why no upload is admitted now; None where one is."""
        if self.receiving < self._receiving and self.working < self._working:
            return None
        return _overloaded(_FULL)

    def _refuse_late(self, within: float | None) -> None:
        """Raise Overloaded where the uploads before will take longer; a first one may try."""
        late = 0.0 if within is None else self.working * self.pace - within
        if late > 0:
            seconds = math.ceil(late)
            raise Overloaded(
                f"the uploads before this one take longer than the {within:g} seconds that it may; "
                f"try again in {seconds} s, or wait longer",
                headers={"Retry-After": str(seconds)},
            )

    def _note_answer(self, arrived: float) -> None:
        now = time.monotonic()
        took = now - max(arrived, self._answered)  # the time before belongs to other uploads
        self._answered = now
        self.pace = took if not self.pace else self.pace + _RECENT * (took - self.pace)

    def _take(self, count: int) -> None:
        if self.bytes + count > self._bytes:
            raise _overloaded("the service holds as many bytes of uploads as it may")
        self.bytes += count

    def _arrive(self) -> None:
        if self.working >= self._working:
            raise _overloaded(_FULL)
        self.receiving -= 1
        self.working += 1


class Body:
    """The body of one admitted upload."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.held = 0
        self.arrived = False
        self.arrived_at = 0.0

    def grow(self, count: int) -> None:
        """Count `count` more bytes that have arrived. Raises Overloaded."""
        self._admission._take(count)
        self.held += count

    def arrive(self) -> None:
        """Mark the body as complete. Raises Overloaded where too many others are worked on."""
        self._admission._arrive()
        self.arrived, self.arrived_at = True, time.monotonic()


def _overloaded(reason: str) -> Overloaded:
    return Overloaded(f"{reason}; try again in a second", headers={"Retry-After": "1"})
