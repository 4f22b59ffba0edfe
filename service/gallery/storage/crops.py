"""Where crops are: in the database up to a size, beyond it as objects (`storage.objects`).

SQL says which object is whose, so the order of writes is: the object's name into `loose_objects`,
the object itself, then the transaction of the item, which takes the name out of `loose_objects`
again. An item thus never names an object that is not there, and whatever a killed process leaves is
listed. An erasure puts the names there in the transaction that deletes the items, and they stay
until the objects are deleted.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    delete,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    update,
)

from service.errors import CropsUnavailable, GalleryDamaged, ServiceError
from service.gallery.storage.database import Database
from service.gallery.storage.group_commit import GroupCommit
from service.gallery.storage.objects import (
    ObjectLost,
    ObjectStorage,
    Placed,
    StorageAway,
    new_name,
)
from service.gallery.storage.rows import blocks
from service.gallery.storage.tables import crops, items, loose_objects, object_owner, objects
from service.gallery.times import microseconds
from service.images.decode import Crop

log = logging.getLogger(__name__)

A = TypeVar("A")

INLINE_BYTES = 65_536
"""Up to this size a crop is in the database also where there is an object storage."""

_FAILED = 0  # in place of an erased item's number
_CLEAN_SECONDS = 5.0
_CLEANED_AT_ONCE = 64  # so that an end need not wait long
# Of a name whose object was never taken: no attempt to write one lasts so long. Where it does, the
# enrollment finds its name gone, and fails.
_ABANDONED = timedelta(hours=1)
_MOVED_AT_ONCE = 64
_AGAIN_SECONDS, _AGAIN = 5.0, 36  # what takes hours is tried again so often
_MARK = "gallery"  # name of the object that says whose the others are
_TOLD = 3  # items that a sentence names


class StoredImage(NamedTuple):
    """A crop's bytes and media type."""

    data: bytes
    media_type: str


class CropsLost(GalleryDamaged):
    """Crops that are not in the object storage any more, or not as they were. ids: of the items."""

    def __init__(self, ids: Sequence[str], why: str) -> None:
        self.ids, self.why = ids, why
        named = ", ".join(ids[:_TOLD])
        if len(ids) > _TOLD:
            named += f" and {len(ids) - _TOLD} more"
        super().__init__(
            f"the crop of item {named} {why} in the object storage; put the object back, or "
            "delete the item"
        )


class Crops:
    """The crops of one gallery. Thread-safe.

    url: of the object storage; None where all crops are in the database. inline_bytes: up to this
    size a new crop is there anyway.
    """

    def __init__(
        self,
        database: Database,
        commits: GroupCommit,
        url: str | None = None,
        inline_bytes: int = INLINE_BYTES,
    ) -> None:
        self._database, self._commits, self._inline_bytes = database, commits, inline_bytes
        self._storage = None if url is None else ObjectStorage(url)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._cleaner: threading.Thread | None = None
        self._mark: Placed | None = None  # once the place is known to be this gallery's
        self.pending = 0
        """Objects that are to be deleted, as of the last look."""

    def start(self) -> None:
        """Check the object storage, and begin to delete what is loose there.

        Raises CropsUnavailable where it refuses, or is not that of this gallery; one that does not
        answer is waited for, since searches need none.
        """
        storage = self._storage
        if storage is None:
            if self._has_objects():
                raise CropsUnavailable(
                    "crops of this gallery are in an object storage; set CMT_CROPS_URL to the one "
                    "that it has, or move them into the database with it and `cmt crops move "
                    "--back` before"
                )
            return
        try:
            self._claim(storage)
            for caution in storage.probe():
                log.warning("%s", caution)
        except StorageAway as error:
            log.warning("%s", error.detail)
        if self._database.sqlite:  # nobody else writes: whoever wrote these has died
            self._abandon(timedelta(0))
        self._cleaner = threading.Thread(target=self._clean_on, name="loose objects", daemon=True)
        self._cleaner.start()

    def close(self) -> None:
        """Stop deleting; what is left is deleted after the next start."""
        self._closing.set()
        self._wake.set()
        if self._cleaner is not None:
            self._cleaner.join()
        if self._storage is not None:
            self._storage.close()

    @property
    def available(self) -> bool | None:
        """Whether the object storage could be used last; None where there is none."""
        if self._storage is None:
            return None
        return self._storage.available and self._mark is not None

    @contextmanager
    def placing(self, new: Sequence[Crop]) -> Iterator[Mapping[int, Placed]]:
        """Write those of new crops that are too large for the database → by place, their objects.

        In this context `insert` takes them; if it ends with an error, they are deleted. Raises
        CropsUnavailable where one cannot be written, and as a write does.
        """
        large = {
            place: new_name()
            for place, crop in enumerate(new)
            if self._storage is not None and len(crop.data) > self._inline_bytes
        }
        if not large or self._storage is None:
            yield {}
            return
        with self._written({name: new[place].data for place, name in large.items()}) as placed:
            yield dict(zip(large, placed, strict=True))

    def insert(
        self,
        connection: Connection,
        numbers: Sequence[int],
        new: Sequence[Crop],
        placed: Mapping[int, Placed],
    ) -> None:
        """Store new items' crops in their transaction. placed: from `placing`."""
        inside = [
            {"number": number, "media_type": crop.media_type, "data": crop.data}
            for place, (number, crop) in enumerate(zip(numbers, new, strict=True))
            if place not in placed
        ]
        if inside:
            connection.execute(insert(crops), inside)
        for place, there in placed.items():
            self._take(connection, numbers[place], new[place].media_type, there)

    def fetch(self, numbers: Sequence[int]) -> dict[int, StoredImage]:
        """The crops of items, by number; of those deleted meanwhile none.

        Raises CropsUnavailable, and CropsLost for what is not as it was stored.
        """
        found: dict[int, StoredImage] = {}
        lost: dict[str, ObjectLost] = {}
        wanted = sorted(set(numbers))
        while wanted:
            outside: list[Row[Any]] = []
            with self._database.reading() as connection:
                for part in blocks(wanted):
                    for row in connection.execute(_located().where(items.c.number.in_(part))):
                        if row.name is None:
                            found[row.number] = StoredImage(bytes(row.data), row.media_type)
                        else:
                            outside.append(row)
            # One that is not there was looked for in SQL again: its item might have been erased, or
            # its crop moved, since the first time.
            dead = [row for row in outside if row.name in lost]
            if dead:
                raise CropsLost([row.id for row in dead], str(lost[dead[0].name]))
            wanted = []
            got = self._used().get([_placed(row) for row in outside]) if outside else []
            for row, data in zip(outside, got, strict=True):
                if isinstance(data, ObjectLost):
                    lost[row.name] = data
                    wanted.append(int(row.number))
                else:
                    found[row.number] = StoredImage(data, row.media_type)
        return found

    def finish(self, numbers: Sequence[int]) -> int:
        """Delete the objects of erased items now, if there are → how many are still there.

        Those are tried again until they are gone.
        """
        names: list[str] = []
        with self._database.reading() as connection:
            for part in blocks(numbers):
                query = select(loose_objects.c.name).where(loose_objects.c.item.in_(part))
                names += connection.execute(query).scalars()
        left = len(names)
        try:
            for some in blocks(names):
                left -= self._clean(some)
        except ServiceError as error:  # the erasure itself is committed
            log.warning("objects of erased items are deleted later: %s", error.detail)
            self._wake.set()
        return left

    def counts(self) -> tuple[int, int]:
        """How many crops are in the database, and how many are objects."""
        with self._database.reading() as connection:
            inside, outside = (
                int(connection.execute(select(func.count()).select_from(table)).scalar_one())
                for table in (crops, objects)
            )
        return inside, outside

    def to_move(self, *, back: bool = False) -> int:
        """How many crops `move` would move now."""
        counts = [select(func.count(number)).where(which) for number, which in self._wrong(back)]
        with self._database.reading() as connection:
            return sum(int(connection.execute(count).scalar_one()) for count in counts)

    def move(self, *, back: bool = False) -> Iterator[int]:
        """Put every crop where a new one of its size would be → how many, after each step.

        back: all into the database. May be stopped at any time and started again, and be done while
        the gallery is used. A storage that is away is waited for. Raises CropsUnavailable,
        CropsLost, and as a write does.
        """
        steps = (self._move_out, self._move_back)
        for (number, which), step in zip(self._wrong(back), steps, strict=True):
            after = 0
            while True:
                query = select(number).where(number > after, which).order_by(number)
                with self._database.reading() as connection:
                    found = connection.execute(query.limit(_MOVED_AT_ONCE)).scalars().all()
                if not found:
                    break
                after = found[-1]
                yield patiently(partial(step, found), self._closing.wait)
        while patiently(self._clean_some, self._closing.wait):  # what is in the database now
            pass

    def _wrong(self, back: bool) -> Iterator[tuple[Column[int], ColumnElement[bool]]]:
        """What is to be moved out of the database, and what into it: numbers, and which of them."""
        if back:
            yield crops.c.number, false()
            yield objects.c.number, true()
        else:
            # PostgreSQL's length() would read all of each crop.
            size = func.length if self._database.sqlite else func.octet_length
            yield crops.c.number, size(crops.c.data) > self._inline_bytes
            yield objects.c.number, objects.c.size <= self._inline_bytes

    def _move_out(self, numbers: Sequence[int]) -> int:
        query = select(crops).where(crops.c.number.in_(numbers))
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        with self._written({new_name(): bytes(row.data) for row in rows}) as placed:
            return self._commits.run(partial(self._take_out, rows=rows, placed=placed))

    def _take_out(
        self, connection: Connection, rows: Sequence[Row[Any]], placed: Sequence[Placed]
    ) -> int:
        moved = 0
        for row, there in zip(rows, placed, strict=True):
            mine = delete(crops).where(crops.c.number == row.number)
            if connection.execute(mine).rowcount:
                self._take(connection, row.number, row.media_type, there)
                moved += 1
            else:  # erased or moved meanwhile
                _loosen(connection, [there.name], _FAILED)
        return moved

    def _move_back(self, numbers: Sequence[int]) -> int:
        query = select(objects).where(objects.c.number.in_(numbers))
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        found = self.fetch(numbers)
        return self._commits.run(partial(self._take_in, rows=rows, found=found))

    def _take_in(
        self,
        connection: Connection,
        rows: Sequence[Row[Any]],
        found: Mapping[int, StoredImage],
    ) -> int:
        moved = 0
        for row in rows:
            mine = delete(objects).where(objects.c.number == row.number, objects.c.name == row.name)
            if connection.execute(mine).rowcount:
                data, media_type = found[row.number]
                connection.execute(
                    insert(crops).values(number=row.number, media_type=media_type, data=data)
                )
                connection.execute(
                    insert(loose_objects).values(name=row.name, item=row.number, since=_now())
                )
                moved += 1
        return moved

    def _used(self) -> ObjectStorage:
        if self._storage is None:
            raise CropsUnavailable(
                "the crop is in an object storage and CMT_CROPS_URL is not set; set it to the one "
                "that this gallery has"
            )
        return self._storage

    @contextmanager
    def _written(self, data: Mapping[str, bytes]) -> Iterator[list[Placed]]:
        """Write objects, listed before; what is not taken in this context is loose after it."""
        storage = self._used()
        self._claim(storage)
        names = list(data)
        rows = [{"name": name, "since": _now()} for name in names]
        self._commits.run(lambda connection: connection.execute(insert(loose_objects), rows))
        try:
            yield storage.put(list(data.items()))
        except BaseException:
            # If not even this can be written, they are found by their age or at the next start.
            with suppress(ServiceError):
                self._commits.run(lambda connection: _loosen(connection, names, _FAILED))
                self._wake.set()
            raise

    def _take(self, connection: Connection, number: int, media_type: str, placed: Placed) -> None:
        """Make an object the crop of an item, in the item's transaction."""
        listed = delete(loose_objects).where(
            loose_objects.c.name == placed.name, loose_objects.c.item.is_(None)
        )
        if not connection.execute(listed).rowcount:
            raise CropsUnavailable(
                "writing the crop to the object storage took too long; send the request again",
                headers={"Retry-After": "1"},
            )
        connection.execute(
            insert(objects).values(number=number, media_type=media_type, **placed._asdict())
        )

    def _claim(self, storage: ObjectStorage) -> None:
        """Make sure, once, that the storage's place is this gallery's and no other's.

        Else objects of another would be deleted, or those of this one never.
        """
        if self._mark is not None:
            return
        owner = self._commits.run(_owner)
        mark = Placed(_MARK, len(owner), hashlib.sha256(owner.encode()).hexdigest())
        [found] = storage.get([mark])
        if isinstance(found, ObjectLost):
            if found.missing and not self._has_objects():
                storage.put([(_MARK, owner.encode())])
            else:
                whose = (
                    "none of this gallery's crops" if found.missing else "another gallery's crops"
                )
                raise CropsUnavailable(
                    f"the object storage {storage.address} holds {whose}; correct CMT_CROPS_URL: "
                    "each gallery has a prefix of its own"
                )
        self._mark = mark

    def _has_objects(self) -> bool:
        """Whether SQL names any object, also one that is to be deleted."""
        with self._database.reading() as connection:
            return any(
                connection.execute(select(table.c.name).limit(1)).first()
                for table in (objects, loose_objects)
            )

    def _abandon(self, age: timedelta) -> None:
        """Give up names listed so long ago whose objects no item has taken.

        Also those from so far in the future, which a clock wrote that was wrong.
        """
        now, since = datetime.now(UTC), loose_objects.c.since
        old = or_(since <= microseconds(now - age), since >= microseconds(now + age))
        late = and_(loose_objects.c.item.is_(None), old)
        query = select(loose_objects.c.name).where(late).limit(1)
        with self._database.reading() as connection:
            if connection.execute(query).first() is None:
                return
        given_up = update(loose_objects).where(late).values(item=_FAILED)
        self._commits.run(lambda connection: connection.execute(given_up))

    def _clean_on(self) -> None:
        told = ""  # what goes on failing is said once
        while not self._closing.is_set():
            try:
                self._look()
                self._abandon(_ABANDONED)
                while self._clean_some() and not self._closing.is_set():
                    pass
                told = ""
            except ServiceError as error:
                if error.code != told:
                    log.warning("%s", error.detail)
                told = error.code
            except Exception:  # the next round tries again
                log.exception("deleting objects of erased items failed")
            self._wake.wait(_CLEAN_SECONDS)
            self._wake.clear()

    def _look(self) -> None:
        """Count what is to be deleted, and ask whether the storage answers, for `available`.

        Raises CropsUnavailable where its place has become another gallery's, or nobody's.
        """
        query = select(func.count()).select_from(loose_objects)
        with self._database.reading() as connection:
            loose = connection.execute(query.where(loose_objects.c.item.is_not(None)))
            self.pending = int(loose.scalar_one())
        storage = self._used()
        if self._mark is not None:
            [found] = storage.get([self._mark])
            if isinstance(found, ObjectLost):  # two that began in the same place at the same moment
                self._mark = None
        self._claim(storage)

    def _clean_some(self) -> int:
        """Delete some of what is loose → how many objects. Raises ServiceError if none could be."""
        query = select(loose_objects.c.name).where(loose_objects.c.item.is_not(None))
        with self._database.reading() as connection:
            names = connection.execute(query.limit(_CLEANED_AT_ONCE)).scalars().all()
        return self._clean(names) if names else 0

    def _clean(self, names: Sequence[str]) -> int:
        storage = self._used()
        self._claim(storage)
        gone, failure = storage.delete(names)
        if gone:
            mine = loose_objects.c.name.in_(gone)
            self._commits.run(
                lambda connection: connection.execute(delete(loose_objects).where(mine))
            )
        if failure is not None:
            raise failure
        return len(gone)


def patiently(call: Callable[[], A], wait: Callable[[float], bool]) -> A:
    """`call()`, again and again while the object storage is away, for some minutes.

    For what takes hours. wait: so many seconds → whether to give up.
    """
    for attempt in range(_AGAIN):
        try:
            return call()
        except StorageAway as error:
            if not attempt:
                log.warning("%s; it is waited for", error.detail.partition(";")[0])
            if wait(_AGAIN_SECONDS):
                raise
    return call()


def loosen_objects_of(connection: Connection, numbers: Sequence[int]) -> None:
    """List the objects of items that this transaction deletes, before it does."""
    mine = select(objects.c.name, objects.c.number, literal(_now())).where(
        objects.c.number.in_(numbers)
    )
    connection.execute(insert(loose_objects).from_select(["name", "item", "since"], mine))


def _loosen(connection: Connection, names: Sequence[str], item: int) -> None:
    for part in blocks(names):
        mine = and_(loose_objects.c.name.in_(part), loose_objects.c.item.is_(None))
        connection.execute(update(loose_objects).where(mine).values(item=item))


def _owner(connection: Connection) -> str:
    """The random name of this gallery, which its object storage has too; made on first use."""
    name = connection.execute(select(object_owner.c.name)).scalar_one_or_none()
    if name is None:
        name = new_name()
        connection.execute(insert(object_owner).values(id=1, name=name))
    return str(name)


def _located() -> Select[Any]:
    """Items with their crop, or the object that holds it."""
    return (
        select(
            *(items.c.number, items.c.id, crops.c.data, objects.c.name, objects.c.size),
            objects.c.sha256,
            func.coalesce(crops.c.media_type, objects.c.media_type).label("media_type"),
        )
        .outerjoin(crops, crops.c.number == items.c.number)
        .outerjoin(objects, objects.c.number == items.c.number)
        .where(or_(crops.c.number.is_not(None), objects.c.number.is_not(None)))
    )


def _placed(row: Row[Any]) -> Placed:
    return Placed(row.name, int(row.size), row.sha256)


def _now() -> int:
    return microseconds(datetime.now(UTC))
