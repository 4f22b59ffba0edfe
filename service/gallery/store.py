"""The truth: rows, crops and features in SQL, each item in one synced transaction."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from service.errors import GalleryDamaged, IdempotencyConflict, ItemNotFound
from service.gallery.database import BUSY_SECONDS, connect, migrate, reported
from service.gallery.records import Filters, Item, NewItem, Page, RequestKey
from service.gallery.rows import (
    conditions_of,
    cursor_of,
    item_of,
    number_of_cursor,
    record_of,
    request_of,
    row_of,
)
from service.gallery.tables import crops, features, items

log = logging.getLogger(__name__)

_TRUNCATE_MILLISECONDS = 2000  # how long a deletion waits for readers
_IDS_PER_STATEMENT = 500  # SQLite takes 32,766 parameters, PostgreSQL 65,535
STORED = np.dtype("<f2")


@dataclass(frozen=True)
class Stored:
    """A block of items as the index needs them: N rows, features N×(P·D) fp16."""

    numbers: list[int]
    persons: list[str | None]
    cameras: list[str | None]
    modalities: list[str]
    captured: list[int | None]
    features: npt.NDArray[np.float16]


class Store:
    """The database of one data folder (or URL), seen with the features of one checkpoint.

    model: the checkpoint's fingerprint. size: P·D. Thread-safe; writes are serialised.
    """

    def __init__(self, folder: Path, model: str, size: int, url: str | None = None) -> None:
        self.model = model
        self.size = size
        self._engine = connect(folder, url)
        self._sqlite = self._engine.dialect.name == "sqlite"
        self._writing = threading.Lock()
        try:
            migrate(self._engine)
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        self._engine.dispose()

    def add(self, new: Sequence[NewItem], rows: npt.NDArray[np.float16]) -> list[tuple[int, Item]]:
        """Commit items with their features (N×(P·D)) → their numbers and records, durable."""
        now = datetime.now(UTC)
        records = [record_of(item, self.model, now) for item in new]
        numbered = insert(items).returning(items.c.number)
        with self._writing, reported(self._engine), self._engine.begin() as connection:
            numbers = [
                int(connection.execute(numbered, row_of(record) | request_of(item)).scalar_one())
                for record, item in zip(records, new, strict=True)
            ]
            connection.execute(
                insert(crops),
                [
                    {"number": n, "media_type": item.crop.media_type, "data": item.crop.data}
                    for n, item in zip(numbers, new, strict=True)
                ],
            )
            connection.execute(
                insert(features),
                [
                    {"number": n, "model": self.model, "data": row.astype(STORED).tobytes()}
                    for n, row in zip(numbers, rows, strict=True)
                ],
            )
        return list(zip(numbers, records, strict=True))

    def get(self, item_id: str) -> Item:
        with reported(self._engine), self._engine.connect() as connection:
            row = connection.execute(select(items).where(items.c.id == item_id)).one_or_none()
        if row is None:
            raise _unknown(item_id)
        return item_of(row)

    def enrolled_by(self, request: RequestKey) -> Item | None:
        """What this request enrolled before. IdempotencyConflict: its key was another's."""
        query = select(items).where(items.c.request_key == request.key)
        with reported(self._engine), self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        if row.request_sha256 != request.sha256:
            raise IdempotencyConflict(
                "this Idempotency-Key enrolled other content before; use a new key"
            )
        return item_of(row)

    def image(self, item_id: str) -> tuple[bytes, str]:
        """The stored crop and its media type."""
        query = select(crops.c.data, crops.c.media_type).join(items).where(items.c.id == item_id)
        with reported(self._engine), self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise _unknown(item_id)
        return bytes(row.data), row.media_type

    def number_of(self, item_id: str) -> int:
        query = select(items.c.number).where(items.c.id == item_id)
        with reported(self._engine), self._engine.connect() as connection:
            number = connection.execute(query).scalar_one_or_none()
        if number is None:
            raise _unknown(item_id)
        return int(number)

    def numbers_of_person(self, person_id: str) -> list[int]:
        query = select(items.c.number).where(items.c.person_id == person_id)
        with reported(self._engine), self._engine.connect() as connection:
            return [int(number) for number in connection.execute(query).scalars()]

    def fetch(self, numbers: Sequence[int]) -> dict[int, Item]:
        """Items by number; those deleted meanwhile are missing."""
        found: dict[int, Item] = {}
        with reported(self._engine), self._engine.connect() as connection:
            for block in _blocks(numbers):
                rows = connection.execute(select(items).where(items.c.number.in_(block)))
                found.update((int(row.number), item_of(row)) for row in rows)
        return found

    def delete(self, numbers: Sequence[int]) -> int:
        """Erase items with crops and features (of every checkpoint) → how many were there."""
        deleted = 0
        with self._writing, reported(self._engine):
            with self._engine.begin() as connection:
                for block in _blocks(numbers):
                    result = connection.execute(delete(items).where(items.c.number.in_(block)))
                    deleted += result.rowcount
            if self._sqlite and deleted:
                self._truncate_log()
        return deleted

    def list(self, filters: Filters, limit: int, cursor: str | None) -> Page:
        conditions = conditions_of(filters)
        after = 0 if cursor is None else number_of_cursor(cursor)
        page = select(items).where(*conditions, items.c.number > after).order_by(items.c.number)
        with reported(self._engine), self._engine.connect() as connection:
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
        with reported(self._engine), self._engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(items)).scalar_one())

    def count_embedded(self) -> int:
        """Items that have features of this checkpoint."""
        query = select(func.count()).select_from(features).where(features.c.model == self.model)
        with reported(self._engine), self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def stream(self, block: int = 16_384) -> Iterator[Stored]:
        """Every item with features of this checkpoint, in order of enrollment."""
        query = (
            select(
                items.c.number,
                items.c.person_id,
                items.c.camera_id,
                items.c.modality,
                items.c.captured_at,
                features.c.data,
            )
            .join(features, features.c.number == items.c.number)
            .where(features.c.model == self.model)
            .order_by(items.c.number)
        )
        with reported(self._engine), self._engine.connect() as connection:
            result = connection.execution_options(yield_per=block).execute(query)
            for rows in result.partitions():
                yield self._stored(rows)

    def _truncate_log(self) -> None:
        """Cut SQLite's log, which still holds the erased pages; what fails is left to a later call.

        The deletion is committed already: nothing here may make it look failed.
        """
        try:
            with self._engine.connect() as connection:
                connection.execute(text(f"PRAGMA busy_timeout = {_TRUNCATE_MILLISECONDS}"))
                busy = connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)")).one()[0]
                connection.execute(text(f"PRAGMA busy_timeout = {1000 * BUSY_SECONDS}"))
            if busy:
                log.info("readers kept SQLite's log open; the next deletion cuts it")
        except SQLAlchemyError as error:
            log.warning("SQLite's log could not be cut after a deletion: %s", error)

    def _stored(self, rows: Sequence[Sequence[Any]]) -> Stored:
        numbers, persons, cameras, modalities, captured, data = zip(*rows, strict=True)
        expected = self.size * STORED.itemsize
        wrong = next((n for n, d in zip(numbers, data, strict=True) if len(d) != expected), None)
        if wrong is not None:
            raise GalleryDamaged(
                f"the features of row {wrong} do not have {expected} bytes; restore a backup"
            )
        flat = np.frombuffer(bytearray().join(data), dtype=STORED)
        return Stored(
            numbers=list(numbers),
            persons=list(persons),
            cameras=list(cameras),
            modalities=list(modalities),
            captured=list(captured),
            features=flat.reshape(len(numbers), self.size),
        )


def _blocks(numbers: Sequence[int]) -> Iterable[Sequence[int]]:
    return (
        numbers[start : start + _IDS_PER_STATEMENT]
        for start in range(0, len(numbers), _IDS_PER_STATEMENT)
    )


def _unknown(item_id: str) -> ItemNotFound:
    return ItemNotFound(f"no item has the id {item_id[:64]}; GET /gallery lists the items")
