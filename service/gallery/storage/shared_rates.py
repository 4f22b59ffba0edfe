"""Requests of keys, counted for all replicas together, in a table of `Replicas`.

A window is counted in `_SLOTS` parts, and a part leaves it as a whole: so in no span of a window's
length more requests are let through than its amount, and each is free again after the window and a
sixtieth of it at the latest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from sqlalchemy import text

from service.gallery.storage.database import Database

_SLOTS = 60
PAUSE_SECONDS = 2
"""So long the others wait for a replica that is stopped while it counts."""
# Locks the row until the end of the transaction, whether it was there or not.
_LOCK = """
    INSERT INTO cmt_rates VALUES (:who, :rate, '[]')
    ON CONFLICT (who, rate) DO UPDATE SET who = excluded.who
    RETURNING counts, extract(epoch FROM clock_timestamp()),
              set_config('idle_in_transaction_session_timeout', :pause, true)
"""
_STORE = text("UPDATE cmt_rates SET counts = :counts WHERE who = :who AND rate = :rate")


def count_request(
    database: Database, who: str, rate: str, limits: Sequence[tuple[int, int]]
) -> float:
    """Count a request of `who` → 0, or the seconds until one more is let through, if none is.

    rate: what names the limits, each so many requests in so many seconds; all of them hold.
    """
    with database.noting(together=True) as connection:
        # Once the row is locked: a moment taken before it may be older than what is counted.
        values = {"who": who, "rate": rate}
        pause = {"pause": f"{PAUSE_SECONDS}s"}
        counts, moment, _ = connection.execute(text(_LOCK), values | pause).one()
        moment = float(moment)
        kept: list[dict[int, int]] = []
        waits = [0.0]
        stored = json.loads(counts) or [{} for _ in limits]
        for (amount, seconds), window in zip(limits, stored, strict=True):
            now = math.floor(moment * _SLOTS / seconds)
            slots: dict[int, int] = {}
            for name, n in window.items():
                slot = min(int(name), now)  # what a clock counted that was set back since
                if slot >= now - _SLOTS:
                    slots[slot] = slots.get(slot, 0) + n
            excess = sum(slots.values()) - amount
            for slot in sorted(slots):
                if excess < 0:
                    break
                excess -= slots[slot]
                waits.append((slot + _SLOTS + 1) * seconds / _SLOTS - moment)
            slots[now] = slots.get(now, 0) + 1
            kept.append(slots)
        if max(waits) > 0:
            return max(waits)
        connection.execute(_STORE, values | {"counts": json.dumps(kept)})
        return 0.0
