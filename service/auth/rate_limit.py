"""How many requests a key may make: moving windows per key.

One process keeps them in memory, on the monotonic clock: setting the time of the machine neither
locks a key out nor frees it. Replicas count together in their database, beside what each of them
knows by itself, which goes on alone while the database is away.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from service.errors import RateLimited, ServiceError

log = logging.getLogger(__name__)

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


Shared = Callable[[str, str, Sequence[Limit]], Awaitable[float]]
"""Counts a request of a key for all replicas: key, rate, limits → seconds to wait, 0 for none.

Raises ServiceError where it cannot.
"""


class Rates:
    """Counts the requests of each key. Used on one event loop.

    default: for keys without a rate of their own; None does not limit them. shared: counts for
    other replicas too.
    """

    def __init__(self, default: str | None, shared: Shared | None = None) -> None:
        self._default, self._shared = default, shared
        self._alone = False  # the last request could not be counted with the other replicas'
        self._refused: dict[tuple[str, str], float] = {}  # until when, by all replicas together
        # The times of the requests that were let through, as many as the limit allows.
        self._windows: dict[tuple[str, Limit], deque[float]] = {}
        self._sweep_at = _SWEEP

    async def count(self, who: str, rate: str | None = None) -> None:
        """Count a request. Raises RateLimited, with the seconds until the next one is allowed."""
        chosen = rate or self._default
        if chosen is None:
            return
        if self._shared is not None:
            await self._count_for_all(self._shared, who, chosen)
        self._count_here(who, chosen)

    async def _count_for_all(self, shared: Shared, who: str, chosen: str) -> None:
        now = time.monotonic()
        wait = self._refused.get((who, chosen), now) - now  # a flood costs the database nothing
        if wait <= 0:
            try:
                wait = await shared(who, chosen, parsed_rate(chosen))
            except ServiceError as error:
                if not self._alone:
                    log.warning(
                        "requests are counted in this replica alone, the database takes no count: "
                        "%s",
                        error.detail,
                    )
                self._alone = True
                return
            self._alone = False
            self._refused.pop((who, chosen), None)
            if wait > 0:
                self._refused[who, chosen] = time.monotonic() + wait
        if wait > 0:
            raise _refusal(chosen, wait)

    def _count_here(self, who: str, chosen: str) -> None:
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
            raise _refusal(chosen, max(waits))
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


def _refusal(chosen: str, wait: float) -> RateLimited:
    seconds = math.ceil(wait)
    return RateLimited(
        f"this key may make {chosen}; try again in {seconds} s",
        headers={"Retry-After": str(seconds)},
    )
