"""Whose image is decoded next: owners take turns, and so do the requests of one owner.

A batch of hundreds of images thus delays the image of another request by the one that is being
decoded, not by all of them.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

J = TypeVar("J")

# Seconds of decoding after which a request leaves a place to the others. So does one of which no
# image has been decoded yet, for nothing is known of it.
_LONG = 1.0


@dataclass(eq=False)
class Share:
    """One request's share of the decoders.

    owner: whose request it is. seconds: of decoding that it may use, None for any. used: those it
    has used. running: its images that are being decoded.
    """

    owner: str
    seconds: float | None = None
    used: float = 0.0
    running: int = 0

    @property
    def spent(self) -> bool:
        """Whether no further image of it may be decoded."""
        return self.seconds is not None and self.used >= self.seconds


class Turns(Generic[J]):
    """The jobs that wait for one of several places. Thread-safe.

    Every `get` or `take` that gave a job a place must be followed by a `done`.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._running = 0
        self._changed = threading.Condition()
        self._closed = False
        # Owner → request → its jobs. The first of each is next, and goes to the end after its turn.
        self._waiting: dict[str, dict[Share, deque[J]]] = {}

    def put(self, share: Share, job: J) -> None:
        """Let a job wait. Raises RuntimeError once closed."""
        with self._changed:
            if self._closed:
                raise RuntimeError("closed")
            self._waiting.setdefault(share.owner, {}).setdefault(share, deque()).append(job)
            self._changed.notify()

    def get(self) -> tuple[Share, J] | None:
        """Wait for the next job; None once closed."""
        with self._changed:
            while not self._closed:
                share = self._next()
                if share is not None:
                    self._begin(share)
                    return share, self._taken(share)
                self._changed.wait()
        return None

    def take(self, share: Share) -> bool:
        """Give a place to a job that has not waited, if one is free and no other job waits.

        As after a `get` that gave a job, there must be a `done`.
        """
        with self._changed:
            if self._closed or self._waiting or self._running >= self._places:
                return False
            self._begin(share)
            return True

    def done(self, share: Share, seconds: float) -> None:
        """Give the place of a job back, which took `seconds`."""
        with self._changed:
            self._running -= 1
            share.running -= 1
            share.used += seconds
            if self._waiting:
                self._changed.notify_all()

    def remove(self, share: Share, job: J) -> None:
        """Forget a job that still waits."""
        with self._changed:
            jobs = self._waiting.get(share.owner, {}).get(share)
            if jobs is not None and job in jobs:
                jobs.remove(job)
                self._forget_empty(share)

    def close(self) -> list[J]:
        """Let `get` answer None from now on → the jobs that waited."""
        with self._changed:
            self._closed = True
            left = [job for of in self._waiting.values() for jobs in of.values() for job in jobs]
            self._waiting.clear()
            self._changed.notify_all()
        return left

    def _begin(self, share: Share) -> None:
        self._running += 1
        share.running += 1

    def _next(self) -> Share | None:
        if self._running >= self._places:
            return None
        for requests in self._waiting.values():
            for share in requests:
                quick = 0 < share.used < _LONG
                if share.running < (self._places if quick else max(1, self._places - 1)):
                    return share
        return None

    def _taken(self, share: Share) -> J:
        """A share's first job; the share and its owner go to the end."""
        requests = self._waiting.pop(share.owner)
        jobs = requests.pop(share)
        job = jobs.popleft()
        requests[share] = jobs
        self._waiting[share.owner] = requests
        self._forget_empty(share)
        return job

    def _forget_empty(self, share: Share) -> None:
        requests = self._waiting[share.owner]
        if not requests[share]:
            del requests[share]
        if not requests:
            del self._waiting[share.owner]
