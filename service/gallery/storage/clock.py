"""Whether the machine's clock can be believed, and how old items are where it could not.

Deleting by age cannot be undone, and clocks are wrong: a board without a battery starts in 1970, a
new one a month ahead. The gallery remembers the latest time at which it ran with a clock that it
believed. A clock is believed that is neither behind that nor too far ahead of it; a service that
was stopped for weeks is not told from a wrong clock, so beyond `AHEAD` the operator decides.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import ColumnElement, Connection, and_, func, insert, or_, select, update

from service.errors import ClockWrong
from service.gallery.storage.database import Database
from service.gallery.storage.group_commit import GroupCommit
from service.gallery.storage.rows import blocks
from service.gallery.storage.tables import audit, clock, items, undated
from service.gallery.times import microseconds, moment_of, utc_now

AHEAD = timedelta(days=21)
"""How far a clock may be ahead of the last time that it was believed."""
_BEHIND = timedelta(minutes=5)  # clocks of replicas differ, and are set back a little
_WRITTEN = timedelta(hours=1)  # between two writes of the time, at least
_FIRST = datetime(2024, 1, 1, tzinfo=UTC)  # before any release: a clock that was never set
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Clock:
    """The clock of one gallery. Thread-safe.

    confirmed: a day that the operator says was today; it is believed whatever the gallery
    remembers. read: the machine's clock.
    """

    def __init__(
        self,
        database: Database,
        commits: GroupCommit,
        *,
        confirmed: date | None = None,
        read: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database, self._commits, self._read = database, commits, read
        self._confirmed = (
            None
            if confirmed is None
            else datetime(confirmed.year, confirmed.month, confirmed.day, tzinfo=UTC)
        )
        self._last: int | None = None  # as `clock` has it

    def now(self) -> datetime:
        """The time, for what is stored now. Raises ClockWrong before 1970."""
        now = self._read()
        if now < _EPOCH:
            raise ClockWrong(f"the machine's clock shows {now:%Y-%m-%d}; set it and try again")
        return now

    def start(self) -> None:
        """Recall when the gallery last ran; before the first time, what its newest rows say."""
        now = self._read()

        def recall(connection: Connection) -> int | None:
            last = connection.execute(select(clock.c.moment)).scalar_one_or_none()
            if last is None:
                last = _newest(connection)
                if last is None and now >= _FIRST:
                    last = microseconds(now)
                if last is not None:
                    connection.execute(insert(clock).values(id=1, moment=last))
            return last

        self._last = self._commits.run(recall)

    def doubt(self, now: datetime) -> str | None:
        """Why the clock cannot be believed when it shows `now`; None if it can."""
        if now < _FIRST:
            return "which is before this program was written"
        if self._is_confirmed(now) or self._last is None:
            return None
        ahead = microseconds(now) - self._last
        if ahead < -_BEHIND // timedelta(microseconds=1):
            return f"behind the time at which the gallery last ran, {_shown(self._last)}"
        if ahead > AHEAD // timedelta(microseconds=1):
            return f"far ahead of the time at which the gallery last ran, {_shown(self._last)}"
        return None

    def observe(self) -> datetime:
        """Remember the time, and that items without a date are there by now → the time.

        Raises ClockWrong where the clock cannot be believed; nothing may be deleted by age then.
        """
        now = self._read()
        with self._database.reading() as connection:
            self._last = connection.execute(select(clock.c.moment)).scalar_one_or_none()
            newest = connection.execute(
                select(items.c.enrolled_at)
                .where(items.c.number.not_in(select(undated.c.number)))
                .order_by(items.c.number.desc())
                .limit(1)
            ).scalar_one_or_none()
        reason = self.doubt(now)
        future = microseconds(now + _BEHIND)
        if (
            reason is None
            and newest is not None
            and newest > future
            and not self._is_confirmed(now)
        ):
            reason = f"behind the newest item, which was enrolled at {_shown(newest)}"
        if reason is not None:
            raise ClockWrong(
                f"the machine's clock shows {now:%Y-%m-%d %H:%M} UTC, {reason}; nothing is deleted "
                "by age until it is set, or until CMT_CLOCK_CONFIRMED says that this day is right"
            )
        self._remember(now, future)
        return now

    def _is_confirmed(self, now: datetime) -> bool:
        day = self._confirmed  # the operator's, which may begin before that of UTC
        return day is not None and day - timedelta(days=1) <= now <= day + AHEAD

    def _remember(self, now: datetime, future: int) -> None:
        """Write what a believed clock shows: the time, and when undated items were seen by it."""
        moment = microseconds(now)
        wrong = or_(items.c.enrolled_at < microseconds(_FIRST), items.c.enrolled_at > future)
        with self._database.reading() as connection:
            unseen = connection.execute(
                select(func.count()).select_from(undated).where(undated.c.seen_at.is_(None))
            ).scalar_one()
            found = connection.execute(
                select(items.c.number).where(wrong, items.c.number.not_in(select(undated.c.number)))
            )
            numbers = [int(number) for number in found.scalars()]
        step = None if self._last is None else moment - self._last
        fresh = step is not None and 0 <= step < _WRITTEN // timedelta(microseconds=1)
        if fresh and not unseen and not numbers:
            return

        def write(connection: Connection) -> None:
            changed = connection.execute(update(clock).values(moment=moment)).rowcount
            if not changed:
                connection.execute(insert(clock).values(id=1, moment=moment))
            for part in blocks(numbers):
                there = connection.execute(
                    select(items.c.number).where(
                        items.c.number.in_(part), items.c.number.not_in(select(undated.c.number))
                    )
                ).scalars()
                note_undated(connection, list(there))
            connection.execute(
                update(undated).where(undated.c.seen_at.is_(None)).values(seen_at=moment)
            )

        self._commits.run(write)
        self._last = moment


def note_undated(connection: Connection, numbers: list[int]) -> None:
    """Note items whose time of enrollment is not to be believed."""
    if numbers:
        connection.execute(insert(undated), [{"number": number} for number in numbers])


def older_than(moment: datetime) -> ColumnElement[bool]:
    """The condition of SQL for items joined with `undated` that are surely older than `moment`.

    Undated ones count from when a believed clock first saw them.
    """
    before = microseconds(moment)
    return or_(
        and_(
            undated.c.number.is_(None),
            items.c.enrolled_at.between(microseconds(_FIRST), before - 1),
        ),
        undated.c.seen_at < before,
    )


def _newest(connection: Connection) -> int | None:
    """The newest time in a gallery of a release that did not remember it."""
    times = [
        connection.execute(
            select(column).where(column >= microseconds(_FIRST)).order_by(number.desc()).limit(1)
        ).scalar_one_or_none()
        for column, number in (
            (items.c.enrolled_at, items.c.number),
            (audit.c.moment, audit.c.number),
        )
    ]
    return max((int(time) for time in times if time is not None), default=None)


def _shown(moment: int) -> str:
    try:
        return f"{moment_of(moment):%Y-%m-%d %H:%M} UTC"
    except OverflowError:
        return "a time beyond the year 9999"
