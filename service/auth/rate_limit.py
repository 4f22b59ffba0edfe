"""How many requests a key may make: moving windows per key, kept in memory.

Measured on the monotonic clock: setting the time of the machine neither locks a key out nor frees
it.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from functools import lru_cache
from typing import NamedTuple

from service.errors import RateLimited

_UNITS = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86_400,
    "month": 30 * 86_400,
    "year": 360 * 86_400,
}
_RATE = re.compile(
    rf"\s*(\d{{1,9}})\s*(?:/|per\b)\s*(\d{{1,4}}\s*)?({'|'.join(_UNITS)})s?\s*",
    re.ASCII | re.IGNORECASE,
)
_SEPARATORS = re.compile("[,;|]")
_SWEEP = 4096  # windows that are kept before those that have ended are looked for


class Limit(NamedTuple):
    """So many requests in so many seconds."""

    amount: int
    seconds: int


@lru_cache(maxsize=1024)
def parsed_rate(text: str) -> tuple[Limit, ...]:
    """The limits that a text such as 50/second or 10/second;500/hour states; all of them hold.

    Raises ValueError, one sentence.
    """
    limits = []
    for single in _SEPARATORS.split(text):
        match = _RATE.fullmatch(single)
        if match is None:
            raise ValueError(
                f"{text!r} is no rate; write a number and second, minute, hour or day, such as "
                "50/second, or several such as 10/second;500/hour"
            )
        amount, times = int(match[1]), int(match[2] or 1)
        if amount == 0 or times == 0:
            raise ValueError(
                f"the rate {text!r} has a zero, so that nothing would be let through; write at "
                "least 1, or revoke the key"
            )
        limits.append(Limit(amount, times * _UNITS[match[3].lower()]))
    return tuple(limits)


def checked_rate(text: str) -> str:
    """Return `text` if it is a rate such as 50/second. Raises ValueError, one sentence, if not."""
    parsed_rate(text)
    return text


class Rates:
    """Counts the requests of each key. Used on one event loop.

    default: for keys without a rate of their own; None does not limit them.
    """

    def __init__(self, default: str | None) -> None:
        self._default = default
        # The times of the requests that were let through, as many as the limit allows.
        self._windows: dict[tuple[str, Limit], deque[float]] = {}
        self._sweep_at = _SWEEP

    def count(self, who: str, rate: str | None = None) -> None:
        """Count a request. Raises RateLimited, with the seconds until the next one is allowed."""
        chosen = rate or self._default
        if chosen is None:
            return
        now = time.monotonic()
        if len(self._windows) >= self._sweep_at:
            self._sweep(now)
        limits = parsed_rate(chosen)
        windows = [
            self._windows.setdefault((who, limit), deque(maxlen=limit.amount)) for limit in limits
        ]
        waits = [
            window[0] + limit.seconds - now
            for window, limit in zip(windows, limits, strict=True)
            if len(window) == limit.amount
        ]
        if waits and max(waits) > 0:
            seconds = math.ceil(max(waits))
            raise RateLimited(
                f"this key may make {chosen}; try again in {seconds} s",
                headers={"Retry-After": str(seconds)},
            )
        for window in windows:
            window.append(now)

    def _sweep(self, now: float) -> None:
        """Forget the windows in which nothing is counted any more."""
        self._windows = {
            (who, limit): times
            for (who, limit), times in self._windows.items()
            if times[-1] + limit.seconds > now
        }
        self._sweep_at = max(_SWEEP, 2 * len(self._windows))
