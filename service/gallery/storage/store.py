"""The source of truth: rows, crops and features in SQL, each item in one synced transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Row, bindparam, delete, exists, func, insert, select, update

from model.labels import LabelError, normalized_label
from service.errors import IdempotencyConflict, ItemNotFound, ServiceError
from service.gallery.feed import Stored
from service.gallery.records import (
    Filters,
    Item,
    ItemUpdate,
    NewItem,
    Page,
    RequestKey,
    meant_label,
)
from service.gallery.storage.audit import Act, Audit, write
from service.gallery.storage.cameras import Cameras
from service.gallery.storage.clock import Clock, note_undated, older_than
from service.gallery.storage.crops import INLINE_BYTES, Crops, loosen_objects_of
from service.gallery.storage.database import Database
from service.gallery.storage.folder_lock import FolderLock
from service.gallery.storage.group_commit import GroupCommit
from service.gallery.storage.rows import (
    blocks,
    columns_of,
    conditions_of,
    cursor_of,
    item_of,
    number_of_cursor,
    record_of,
    request_of,
    row_of,
    storable,
)
from service.gallery.storage.streaming import BLOCK, View, announce, checked, record_changes
from service.gallery.storage.tables import features, items, undated
from service.gallery.storage.versions import Versions, refuse_retired
from service.gallery.times import utc_now

log = logging.getLogger(__name__)

LabelField = Literal["person_id", "camera_id"]

# Built once: building it takes as long as reading twenty rows.
_BY_NUMBER = select(items).where(items.c.number.in_(bindparam("numbers", expanding=True)))
_WHOLE_ROWS = f"SELECT {', '.join(items.c.keys())} FROM items WHERE number IN"
_CACHED = {"person_id", "camera_id", "captured_at"}  # what `Stored` has of an item


class Store:
    """The database of one data folder (or URL), seen with the features of one model version.

    model: the checkpoint's fingerprint. size: P·D. Thread-safe; writes that come together share
    one transaction. `versions` are all model versions, `cameras` is what is known of the cameras,
    `audit` is the log of who did what, `clock` knows how far the machine's can be believed.
    `crops` knows where the crops are. confirmed, read_clock: for `Clock`. crops_url,
    crops_inline_bytes: for `Crops`.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        size: int,
        url: str | None = None,
        configuration: dict[str, Any] | None = None,
        lock: FolderLock | None = None,
        *,
        confirmed: date | None = None,
        read_clock: Callable[[], datetime] = utc_now,
        crops_url: str | None = None,
        crops_inline_bytes: int = INLINE_BYTES,
    ) -> None:
        self.model = model
        self.size = size
        self.database = Database(folder, url, lock=lock)
        self._commits = GroupCommit(self.database)
        try:
            self.crops = Crops(self.database, self._commits, crops_url, crops_inline_bytes)
        except BaseException:
            self.database.close()
            raise
        self.versions = Versions(self.database, self._commits, self.crops)
        self.audit = Audit(self.database, self._commits, folder)
        self.cameras = Cameras(self.database, self._commits)
        self.clock = Clock(self.database, self._commits, confirmed=confirmed, read=read_clock)
        try:
            self.crops.start()
            self.clock.start()
            self.audit.load_key()  # now, so that a deletion needs no disk space for it
            self.versions.register(model, configuration)
        except BaseException:
            self.close()
            raise

    def seen_with(self, model: str, size: int) -> Store:
        """The same store seen with another version that it knows; closing either closes both.

        Raises ModelVersionUnknown.
        """
        self.versions.state(model)  # raises for an unknown version
        other = copy(self)
        other.model, other.size = model, size
        return other

    def close(self) -> None:
        """Close the database, and the object storage."""
        self.crops.close()
        self.database.close()

    @property
    def shared(self) -> bool:
        """Whether other processes may write to it."""
        return not self.database.sqlite

    def label(self, field: LabelField, text: str) -> str:
        """`text` as a label. Raises LabelError for what is none, unless an item has it.

        Filters and erasures take any text (`meant_label`); this tells who sent one that it cannot
        match.
        """
        try:
            return normalized_label(text)
        except LabelError:
            query = select(exists().where(items.c[field].in_(storable([text]))))
            with self.database.reading() as connection:
                if not connection.execute(query).scalar_one():
                    raise
            return text

    def add(self, new: Sequence[NewItem], rows: npt.NDArray[np.float16]) -> list[tuple[int, Item]]:
        """Commit items with their features (N×(P·D)) → their numbers and records, durable.

        All or none. Raises LabelError, ValueError for features of another shape or not finite and
        for a time without offset, ModelVersionConflict where the gallery now uses another version,
        IdempotencyConflict where an item of the same Idempotency-Key was enrolled at the same
        moment, and CropsUnavailable where a crop cannot be written to the object storage.
        """
        rows = checked(rows, len(new), self.size)
        if not new:
            return []
        now = self.clock.now()
        records = [record_of(item, self.model, now) for item in new]
        # In one statement: SQLAlchemy gives the numbers in the order of the rows.
        numbered = insert(items).returning(items.c.number, sort_by_parameter_order=True)
        rows_of_items = [
            row_of(record) | request_of(item) for record, item in zip(records, new, strict=True)
        ]
        pictures = [item.crop for item in new]

        def work(connection: Connection) -> list[int]:
            refuse_retired(connection, self.model)
            numbers = list(connection.execute(numbered, rows_of_items).scalars())
            self.crops.insert(connection, numbers, pictures, placed)
            connection.execute(
                insert(features),
                [
                    {"number": n, "model": self.model, "data": row.tobytes()}
                    for n, row in zip(numbers, rows, strict=True)
                ],
            )
            if self.clock.doubt(now) is not None:
                note_undated(connection, numbers)
            announce(connection)
            return numbers

        with self.crops.placing(pictures) as placed:
            numbers = self._commits.run(work)
        return list(zip(numbers, records, strict=True))

    def get(self, item_id: str) -> Item:
        """The item with this id. Raises ItemNotFound."""
        with self.database.reading() as connection:
            row = connection.execute(select(items).where(items.c.id == item_id)).one_or_none()
        if row is None:
            raise unknown_item(item_id)
        return item_of(row)

    def enrolled_by(self, request: RequestKey) -> Item | None:
        """What this request enrolled before; None if nothing.

        Raises IdempotencyConflict where the same key enrolled other content.
        """
        found = self.enrolled_by_each([request]).get(request.key)
        if isinstance(found, IdempotencyConflict):
            raise found
        return found

    def enrolled_by_each(
        self, requests: Sequence[RequestKey]
    ) -> dict[str, Item | IdempotencyConflict]:
        """What requests of different keys enrolled before, by key; those of nothing are missing.

        An IdempotencyConflict stands where the same key enrolled other content.
        """
        sha256 = dict(requests)
        found: dict[str, Item | IdempotencyConflict] = {}
        with self.database.reading() as connection:
            for part in blocks(list(sha256)):
                query = select(items).where(items.c.request_key.in_(part))
                for row in connection.execute(query):
                    key = row.request_key
                    if row.request_sha256 == sha256[key]:
                        found[key] = item_of(row)
                    else:
                        found[key] = IdempotencyConflict(
                            "this Idempotency-Key enrolled other content before; use a new key"
                        )
        return found

    def image(self, item_id: str) -> tuple[bytes, str]:
        """The stored crop and its media type.

        Raises ItemNotFound, CropsUnavailable, and GalleryDamaged for one that is not as it was
        stored.
        """
        number = self.number_of(item_id)
        found = self.crops.fetch([number])
        if number not in found:
            raise unknown_item(item_id)
        return found[number]

    def number_of(self, item_id: str) -> int:
        """The row number of the item with this id. Raises ItemNotFound."""
        query = select(items.c.number).where(items.c.id == item_id)
        with self.database.reading() as connection:
            number = connection.execute(query).scalar_one_or_none()
        if number is None:
            raise unknown_item(item_id)
        return int(number)

    def numbers_before(self, moment: datetime, limit: int) -> list[int]:
        """Row numbers of the first `limit` items that were surely enrolled before a moment."""
        old = select(items.c.number).outerjoin(undated, undated.c.number == items.c.number)
        query = old.where(older_than(moment)).order_by(items.c.number).limit(limit)
        with self.database.reading() as connection:
            return [int(number) for number in connection.execute(query).scalars()]

    def fetch(self, numbers: Sequence[int]) -> dict[int, Item]:
        """Items by number; those deleted meanwhile are missing."""
        found: dict[int, Item] = {}
        if self.database.sqlite:  # every query waits for this, which takes a third of the time
            for block in blocks(numbers):
                places = ", ".join("?" * len(block))
                for row in self.database.rows(f"{_WHOLE_ROWS} ({places})", block):
                    found[row[0]] = item_of(row)
            return found
        with self.database.reading() as connection:
            for block in blocks(numbers):
                rows = connection.execute(_BY_NUMBER, {"numbers": block})
                found.update((row[0], item_of(row)) for row in rows)
        return found

    def update(self, item_id: str, changed: ItemUpdate, *, actor: str = "system") -> Item:
        """Give an item new labels or metadata → the item as it is then.

        Raises ItemNotFound and LabelError.
        """
        columns = columns_of(changed)
        mine = items.c.id == item_id

        def work(connection: Connection) -> Row[Any] | None:
            if columns:
                number = connection.execute(
                    update(items).where(mine).values(columns).returning(items.c.number)
                ).scalar_one_or_none()
                if number is not None:
                    if columns.keys() & _CACHED:
                        record_changes(connection, [number], "labels")
                    given = {"fields": list(changed.fields)}
                    write(connection, [Act(actor, "update", item_id, given)])
            return connection.execute(select(items).where(mine)).one_or_none()

        row = self._commits.run(work)
        if row is None:
            raise unknown_item(item_id)
        if "person_id" in columns:
            self._cut_log()
        return item_of(row)

    def delete(self, numbers: Sequence[int], *, actor: str = "system") -> int:
        """Erase items with crops and features (of every version) → how many were there.

        Their objects are deleted by `crops.finish`, or in the background. A number given twice
        counts once, one of no item does not count.
        """
        wanted = sorted(set(numbers))

        def work(connection: Connection) -> int:
            gone = _erase(connection, wanted)
            write(
                connection,
                [Act(actor, "delete", row.id, self._person(row.person_id)) for row in gone],
            )
            return len(gone)

        deleted = self._commits.run(work)
        if deleted:
            self._cut_log()
        return deleted

    def erase_person(self, person_id: str, *, actor: str = "system") -> list[int]:
        """Erase all items of a person, also those that another process added → their numbers."""
        person_id = meant_label(person_id)
        subject = self.audit.pseudonym(person_id)

        def work(connection: Connection) -> list[int]:
            mine = items.c.person_id.in_(storable([person_id]))
            query = select(items.c.number).where(mine)
            gone = _erase(connection, connection.execute(query).scalars().all())
            write(connection, [Act(actor, "erase", subject, {"items": len(gone)})])
            return sorted(int(row.number) for row in gone)

        numbers = self._commits.run(work)
        self._cut_log()
        return numbers

    def list(self, filters: Filters, limit: int, cursor: str | None) -> Page:
        """Items in order of enrollment, after `cursor`. Raises CursorInvalid."""
        conditions = conditions_of(filters.meant())
        after = 0 if cursor is None else number_of_cursor(cursor)
        page = select(items).where(*conditions, items.c.number > after).order_by(items.c.number)
        with self.database.reading() as connection:
            rows = connection.execute(page.limit(limit + 1)).all()
            total = connection.execute(
                select(func.count()).select_from(items).where(*conditions)
            ).scalar_one()
        more = len(rows) > limit
        rows = rows[:limit]
        return Page(
            items=[item_of(row) for row in rows],
            next_cursor=cursor_of(int(rows[-1].number)) if more and rows else None,
            total=int(total),
        )

    def count(self) -> int:
        """Items of any checkpoint."""
        with self.database.reading() as connection:
            return int(connection.execute(select(func.count()).select_from(items)).scalar_one())

    @contextmanager
    def view(self) -> Iterator[View]:
        """One state of the store to read from: position, features and changes agree.

        Keep it open only as long as needed: SQLite cannot truncate its log meanwhile.
        """
        with self.database.reading() as connection:
            yield View(connection, self.model, self.size)

    def stream(self, after: int = 0, block: int = BLOCK) -> Iterator[Stored]:
        """Items with features of this version and numbers above `after`, in order of enrollment."""
        with self.view() as view:
            yield from view.stream(after, block)

    def finish_erasing(self) -> None:
        """Truncate SQLite's log if a deletion could not."""
        if self.database.wal_pending and not self.database.copying:
            self._cut_log()

    def _person(self, person_id: str | None) -> dict[str, str]:
        return {} if person_id is None else {"person": self.audit.pseudonym(person_id)}

    def _cut_log(self) -> None:
        """Truncate SQLite's log, which still holds what was erased; `finish_erasing` tries again.

        The erasure is committed already: no error here may make it look as if it failed.
        """
        try:
            if not self.database.truncate_log():
                log.info("readers kept SQLite's log open; it is cut later")
        except ServiceError as error:
            log.warning("SQLite's log could not be cut after a deletion: %s", error)


def _erase(connection: Connection, numbers: Sequence[int]) -> list[Row[Any]]:
    """Delete items → number, id and person of those that were there."""
    gone: list[Row[Any]] = []
    for part in blocks(numbers):
        loosen_objects_of(connection, part)
        statement = delete(items).where(items.c.number.in_(part))
        returned = statement.returning(items.c.number, items.c.id, items.c.person_id)
        gone.extend(connection.execute(returned))
    record_changes(connection, sorted(int(row.number) for row in gone), "delete")
    return gone


def unknown_item(item_id: str) -> ItemNotFound:
    """The error for an id that no item has, or no longer."""
    return ItemNotFound(f"no item has the id {item_id[:64]}; GET /gallery lists the items")
