"""Times as the gallery stores them: microseconds since 1970 UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def microseconds(moment: datetime) -> int:
    """Since 1970 UTC. ValueError: a time without offset, whose moment nobody knows."""
    if moment.tzinfo is None:
        raise ValueError("a time needs an offset, as in 2026-01-31T12:00:00+01:00")
    return (moment - _EPOCH) // _MICROSECOND


def moment_of(since_epoch: int) -> datetime:
    """The time that `microseconds` turned into a number."""
    return _EPOCH + since_epoch * _MICROSECOND
