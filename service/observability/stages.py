"""Where the time of one request goes, without a gap."""

from __future__ import annotations

import time


class Stages:
    """Seconds of each stage of a request, one after the other: their sum is the time that passed.

    started: by `time.perf_counter`, now if it is not given. ended: when each was over, last.
    """

    def __init__(self, started: float | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self._started = self._last = time.perf_counter() if started is None else started

    def end(self, stage: str, **parts: float) -> None:
        """End what has gone on since the last call: a `stage`, then the `parts` in their order."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        at = now - passed
        for part, seconds in {stage: passed - sum(parts.values()), **parts}.items():
            at += seconds
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
            self.ended[part] = at

    @property
    def total(self) -> float:
        """Seconds from the start to the last call of `end`."""
        return self._last - self._started
