"""How many requests a key may make: a moving window per key, kept in memory."""

from __future__ import annotations

import math
import time

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from service.errors import RateLimited


def checked_rate(text: str) -> str:
    """Return `text` if it is a rate such as 50/second. Raises ValueError, one sentence, if not."""
    try:
        parse(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no rate; write a number and second, minute, hour or day, such as "
            "50/second"
        ) from error
    return text


class Rates:
    """Counts the requests of each key. Thread-safe.

    default: for keys without a rate of their own; None does not limit them.
    """

    def __init__(self, default: str | None) -> None:
        self._default = default
        self._windows = MovingWindowRateLimiter(MemoryStorage())

    def count(self, who: str, rate: str | None = None) -> None:
        """Count a request. Raises RateLimited, with the seconds until the next one is allowed."""
        chosen = rate or self._default
        if chosen is None:
            return
        limit = parse(chosen)
        if not self._windows.hit(limit, who):
            reset = self._windows.get_window_stats(limit, who).reset_time
            seconds = max(1, math.ceil(reset - time.time()))
            raise RateLimited(
                f"this key may make {limit}; try again in {seconds} s",
                headers={"Retry-After": str(seconds)},
            )
