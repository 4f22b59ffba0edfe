"""Times as the gallery stores them: microseconds since 1970 UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def utc_now() -> datetime:
    """The time that the machine's clock shows."""
    return datetime.now(UTC)


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970 UTC.

    Raises ValueError for a time without offset, because its moment is unknown.
    """
    if moment.tzinfo is None:
        raise ValueError("a time needs an offset, as in 2026-01-31T12:00:00+01:00")
    return (moment - _EPOCH) // _MICROSECOND


def moment_of(since_epoch: int) -> datetime:
    """The time in UTC, the inverse of `microseconds`."""
    return _EPOCH + since_epoch * _MICROSECOND
