"""What is deleted by age while the machine's clock is wrong: nothing that is not surely old."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete, insert, update

from service.errors import ClockWrong
from service.gallery import Act, Filters, Gallery, NewItem
from service.gallery.backup.restore import restore
from service.gallery.storage.tables import audit, clock, items
from service.gallery.times import microseconds
from tests.service.places import INFO, MakePlace, Place, features
from tests.service.stores import crop

TODAY = datetime(2026, 6, 15, 12, tzinfo=UTC)
DAY = timedelta(days=1)
UNSET = datetime(1970, 1, 1, 0, 2, tzinfo=UTC)  # two minutes after a start without a battery
WEEK = 7.0  # days that items are kept here


class Machine:
    """A gallery that is opened again and again, on a machine whose clock the test sets."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.shows = TODAY
        self._seed = 0

    @contextmanager
    def at(self, shows: datetime, confirmed: date | None = None) -> Iterator[Gallery]:
        """The gallery as it is opened when the clock shows this."""
        self.shows = shows
        gallery = Gallery.open(
            self._place.folder,
            INFO,
            database_url=self._place.url,
            clock_confirmed=confirmed,
            read_clock=lambda: self.shows,
        )
        try:
            yield gallery
        finally:
            gallery.close()

    def enroll(self, gallery: Gallery) -> str:
        self._seed += 1
        (item,) = gallery.add([NewItem(crop(self._seed))], features(1, self._seed))
        return item.id


@pytest.fixture(params=["sqlite", "postgresql"])
def machine(request: pytest.FixtureRequest, make_place: MakePlace) -> Machine:
    return Machine(make_place(request.param))


def kept(gallery: Gallery) -> list[str]:
    return [item.id for item in gallery.list(Filters(), 100).items]


@pytest.mark.parametrize("days", [0.5, 3, 10, 20.9])
def test_after_ordinary_downtime_what_is_old_goes(machine: Machine, days: float) -> None:
    with machine.at(TODAY) as gallery:
        machine.enroll(gallery)
        assert gallery.retain(WEEK) == 0
    with machine.at(TODAY + timedelta(days=days)) as gallery:
        new = machine.enroll(gallery)
        assert gallery.retain(WEEK) == (1 if days > WEEK else 0)
        assert kept(gallery)[-1] == new


@pytest.mark.parametrize("days", [30, 365, 20_000])
def test_a_start_far_ahead_deletes_nothing(machine: Machine, days: int) -> None:
    """Nor does anything that happens while the clock is wrong make it credible."""
    with machine.at(TODAY) as gallery:
        first = machine.enroll(gallery)
        gallery.retain(WEEK)
    for start in range(3):
        with machine.at(TODAY + days * DAY + start * DAY) as gallery:
            machine.enroll(gallery)
            gallery.record(Act("key:1", "query"))
            with pytest.raises(ClockWrong, match=r"far ahead .* CMT_CLOCK_CONFIRMED"):
                gallery.retain(WEEK)
            assert len(gallery) == 2 + start
    with machine.at(TODAY + DAY) as gallery:  # now the clock is right
        assert gallery.retain(WEEK) == 0
    with machine.at(TODAY + 8 * DAY) as gallery:
        assert gallery.retain(WEEK) == 1
        assert first not in kept(gallery)
    with machine.at(TODAY + 9 * DAY) as gallery:  # eight days after a right clock saw the others
        assert gallery.retain(WEEK) == 3


def test_a_clock_that_jumps_ahead_while_the_service_runs_deletes_nothing(machine: Machine) -> None:
    with machine.at(TODAY) as gallery:
        machine.enroll(gallery)
        gallery.retain(WEEK)
        machine.shows = TODAY + 40 * DAY
        with pytest.raises(ClockWrong, match="far ahead"):
            gallery.retain(WEEK)
        machine.shows = TODAY + 8 * DAY
        assert gallery.retain(WEEK) == 1


@pytest.mark.parametrize("before", [UNSET, datetime(2016, 2, 11, tzinfo=UTC), TODAY - 60 * DAY])
@pytest.mark.parametrize("known", [True, False])
def test_what_was_enrolled_by_a_clock_that_was_behind_is_kept_its_time(
    machine: Machine, before: datetime, known: bool
) -> None:
    if before.year == TODAY.year and not known:
        pytest.skip("nothing says that this clock is wrong")
    if known:
        with machine.at(TODAY) as gallery:
            machine.enroll(gallery)
            gallery.retain(WEEK)
    with machine.at(before) as gallery:
        behind = machine.enroll(gallery)
        with pytest.raises(ClockWrong):
            gallery.retain(WEEK)
    with machine.at(TODAY + DAY) as gallery:  # as soon as the clock is right
        assert gallery.retain(WEEK) == 0
        assert behind in kept(gallery)
    with machine.at(TODAY + 7.9 * DAY) as gallery:
        assert gallery.retain(WEEK) == (1 if known else 0)
        assert behind in kept(gallery)
    with machine.at(TODAY + 8.1 * DAY) as gallery:
        assert gallery.retain(WEEK) == 1
        assert kept(gallery) == []


def test_items_of_1970_of_an_earlier_release_are_kept_too(machine: Machine) -> None:
    with machine.at(TODAY) as gallery:
        machine.enroll(gallery)
        with gallery._store.database.writing() as connection:
            connection.execute(update(items).values(enrolled_at=microseconds(UNSET)))
        assert gallery.retain(WEEK) == 0
        machine.shows = TODAY + 8 * DAY
        assert gallery.retain(WEEK) == 1


def test_while_the_clock_is_behind_the_newest_item_retention_waits(machine: Machine) -> None:
    with machine.at(TODAY) as gallery:
        for shows in (-20, 2):
            item = machine.enroll(gallery)
            with gallery._store.database.writing() as connection:
                time = microseconds(TODAY + shows * DAY)
                connection.execute(update(items).where(items.c.id == item).values(enrolled_at=time))
        with pytest.raises(ClockWrong, match="behind the newest item"):
            gallery.retain(WEEK)
        machine.shows = TODAY + 2 * DAY
        assert gallery.retain(WEEK) == 1


def test_a_gallery_that_never_noted_the_time_goes_by_its_newest_rows(machine: Machine) -> None:
    """As one of an earlier release, at its first start, with a clock that is a month ahead."""
    with machine.at(TODAY - 25 * DAY) as gallery:
        machine.enroll(gallery)
        with gallery._store.database.writing() as connection:
            connection.execute(delete(clock))
            entry = {"moment": microseconds(TODAY), "actor": "key:1", "action": "query"}
            connection.execute(insert(audit).values(**entry, details="{}"))
    with machine.at(TODAY + 30 * DAY) as gallery, pytest.raises(ClockWrong, match="far ahead"):
        gallery.retain(WEEK)
    with machine.at(TODAY + 8 * DAY) as gallery:
        assert gallery.retain(WEEK) == 1


@pytest.mark.parametrize("days", [-200, 200])
def test_the_operator_confirms_a_clock_that_differs(machine: Machine, days: int) -> None:
    """After months of rest, or where the gallery was begun with a clock that was wrong."""
    then = TODAY + days * DAY
    with machine.at(TODAY) as gallery:
        machine.enroll(gallery)
        gallery.retain(WEEK)
    with machine.at(then, confirmed=date(2020, 1, 1)) as gallery, pytest.raises(ClockWrong):
        gallery.retain(WEEK)  # another day than the clock's confirms nothing
    with machine.at(then, confirmed=then.date()) as gallery:
        assert gallery.retain(WEEK) == (1 if days > 0 else 0)
        machine.enroll(gallery)
    with machine.at(then + 8 * DAY) as gallery:  # from then on without the setting
        assert gallery.retain(WEEK) == (1 if days > 0 else 2)


def test_a_backup_that_is_restored_late_waits_for_the_operator(tmp_path: Path) -> None:
    machine = Machine(Place(tmp_path / "data", None))
    with machine.at(TODAY) as gallery:
        machine.enroll(gallery)
        gallery.backup(tmp_path / "gallery.zip")
    restore(tmp_path / "gallery.zip", tmp_path / "restored")
    late = Machine(Place(tmp_path / "restored", None))
    with late.at(TODAY + 90 * DAY) as gallery, pytest.raises(ClockWrong):
        gallery.retain(WEEK)
    with late.at(TODAY + 90 * DAY, confirmed=(TODAY + 90 * DAY).date()) as gallery:
        assert gallery.retain(WEEK) == 1


def test_a_clock_before_1970_is_a_sentence(machine: Machine) -> None:
    with machine.at(datetime(1969, 12, 31, 23, tzinfo=UTC)) as gallery:
        with pytest.raises(ClockWrong, match="shows 1969-12-31; set it") as caught:
            machine.enroll(gallery)
        assert (caught.value.status, caught.value.code) == (503, "clock_wrong")
        with pytest.raises(ClockWrong):
            gallery.retain(WEEK)
        gallery.record(Act("key:1", "query"))
        machine.shows = TODAY
        item = machine.enroll(gallery)
        assert kept(gallery) == [item]
