"""The truth: rows, crops and features in SQL, each item in one synced transaction."""

from __future__ import annotations

import base64
import binascii
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, not_, or_, select, text

from service.errors import CursorInvalid, GalleryDamaged, IdempotencyConflict, ItemNotFound
from service.gallery.database import connect, migrate, reported
from service.gallery.records import Filters, Item, NewItem, Page, RequestKey
from service.gallery.tables import crops, features, items

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_IDS_PER_STATEMENT = 500  # SQLite takes 32,766 parameters, PostgreSQL 65,535
# Columns that hold an Item's field of the same name as it is.
_SAME_NAME = (
    "id",
    "person_id",
    "camera_id",
    "modality",
    "modality_source",
    "width",
    "height",
    "bit_depth",
    "sha256",
    "model",
)
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
        records = [_record(item, self.model, now) for item in new]
        numbered = insert(items).returning(items.c.number)
        with self._writing, reported(self._engine), self._engine.begin() as connection:
            numbers = [
                int(connection.execute(numbered, _row(record) | _request(item)).scalar_one())
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
        return _item(row)

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
        return _item(row)

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
                found.update((int(row.number), _item(row)) for row in rows)
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
                # The log still holds the old pages; where readers are busy, a later call cuts it.
                with self._engine.connect() as connection:
                    connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
        return deleted

    def list(self, filters: Filters, limit: int, cursor: str | None) -> Page:
        conditions = _conditions(filters)
        after = 0 if cursor is None else _number_of_cursor(cursor)
        page = select(items).where(*conditions, items.c.number > after).order_by(items.c.number)
        with reported(self._engine), self._engine.connect() as connection:
            rows = connection.execute(page.limit(limit + 1)).all()
            total = connection.execute(
                select(func.count()).select_from(items).where(*conditions)
            ).scalar_one()
        more = len(rows) > limit
        rows = rows[:limit]
        return Page(
            items=[_item(row) for row in rows],
            next_cursor=_cursor(int(rows[-1].number)) if more and rows else None,
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


def microseconds(moment: datetime) -> int:
    """Since 1970 UTC. ValueError: a time without offset, whose moment nobody knows."""
    if moment.tzinfo is None:
        raise ValueError("a time needs an offset, as in 2026-01-31T12:00:00+01:00")
    return (moment - _EPOCH) // _MICROSECOND


def _record(new: NewItem, model: str, now: datetime) -> Item:
    crop = new.crop
    captured = new.captured_at
    return Item(
        id=_uuid7(now),
        person_id=new.person_id,
        camera_id=new.camera_id,
        captured_at=None if captured is None else _moment(microseconds(captured)),
        enrolled_at=now,
        modality=crop.modality,
        modality_source=crop.modality_source,
        width=crop.width,
        height=crop.height,
        bit_depth=crop.bit_depth,
        sha256=crop.sha256,
        metadata=new.metadata,
        model=model,
    )


def _row(item: Item) -> dict[str, Any]:
    row = {name: getattr(item, name) for name in _SAME_NAME}
    captured = item.captured_at
    row["captured_at"] = None if captured is None else microseconds(captured)
    row["enrolled_at"] = microseconds(item.enrolled_at)
    row["details"] = json.dumps(item.metadata, ensure_ascii=False)
    return row


def _request(new: NewItem) -> dict[str, str]:
    if new.request is None:
        return {}
    return {"request_key": new.request.key, "request_sha256": new.request.sha256}


def _item(row: Row[Any]) -> Item:
    values = dict(row._mapping)
    for internal in ("number", "request_key", "request_sha256"):
        del values[internal]
    values["metadata"] = json.loads(values.pop("details"))
    captured = values["captured_at"]
    values["captured_at"] = None if captured is None else _moment(captured)
    values["enrolled_at"] = _moment(values["enrolled_at"])
    return Item(**values)


def _moment(since_epoch: int) -> datetime:
    return _EPOCH + since_epoch * _MICROSECOND


def _conditions(filters: Filters) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if filters.person_id:
        conditions.append(items.c.person_id.in_(filters.person_id))
    if filters.camera_id:
        conditions.append(items.c.camera_id.in_(filters.camera_id))
    if filters.exclude_camera_id:
        excluded = items.c.camera_id.in_(filters.exclude_camera_id)
        conditions.append(or_(items.c.camera_id.is_(None), not_(excluded)))
    if filters.gallery_modality:
        conditions.append(items.c.modality.in_(filters.gallery_modality))
    if filters.captured_from is not None:
        conditions.append(items.c.captured_at >= microseconds(filters.captured_from))
    if filters.captured_to is not None:
        conditions.append(items.c.captured_at < microseconds(filters.captured_to))
    return [and_(*conditions)] if conditions else []


def _uuid7(now: datetime) -> str:
    """RFC 9562: 48 bits of milliseconds, then random bits."""
    value = microseconds(now) // 1000 << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76  # version
    value = value & ~(0x3 << 62) | 0x2 << 62  # variant
    return str(UUID(int=value))


def _cursor(number: int) -> str:
    return base64.urlsafe_b64encode(f"after:{number}".encode()).decode()


def _number_of_cursor(cursor: str) -> int:
    try:
        kind, _, number = (
            base64.b64decode(cursor, altchars=b"-_", validate=True).decode().partition(":")
        )
        if kind == "after" and number.isascii() and number.isdigit() and len(number) < 19:
            return int(number)
    except (binascii.Error, UnicodeError, ValueError):
        pass
    raise CursorInvalid("the cursor is not one of this gallery's; start again without one")


def _blocks(numbers: Sequence[int]) -> Iterable[Sequence[int]]:
    return (
        numbers[start : start + _IDS_PER_STATEMENT]
        for start in range(0, len(numbers), _IDS_PER_STATEMENT)
    )


def _unknown(item_id: str) -> ItemNotFound:
    return ItemNotFound(f"no item has the id {item_id[:64]}; GET /gallery lists the items")
