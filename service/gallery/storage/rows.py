"""Items as rows of SQL and back: times, ids, filters and cursors in the database's form."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import ColumnElement, Row, and_, not_, or_

from model.labels import normalized_label
from service.errors import CursorInvalid
from service.gallery.metadata import check_metadata
from service.gallery.records import Filters, Item, ItemUpdate, NewItem
from service.gallery.storage.tables import items
from service.gallery.times import microseconds, moment_of

T = TypeVar("T")

_VALUES_PER_STATEMENT = 500  # SQLite takes 32,766 parameters, PostgreSQL 65,535
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
    "polarity",
)


def record_of(new: NewItem, model: str, now: datetime) -> Item:
    """The item that a new one becomes, with a new id.

    Raises LabelError, and ValueError as `check_metadata` and `microseconds`.
    """
    check_metadata(new.metadata)
    crop = new.crop
    captured = new.captured_at
    return Item(
        id=_uuid7(now),
        person_id=_label(new.person_id),
        camera_id=_label(new.camera_id),
        captured_at=None if captured is None else moment_of(microseconds(captured)),
        enrolled_at=now,
        modality=crop.modality,
        modality_source=crop.modality_source,
        width=crop.width,
        height=crop.height,
        bit_depth=crop.bit_depth,
        sha256=crop.sha256,
        metadata=new.metadata,
        model=model,
        polarity=crop.polarity,
    )


def row_of(item: Item) -> dict[str, Any]:
    """An item's columns, all but its number."""
    row = {name: getattr(item, name) for name in _SAME_NAME}
    captured = item.captured_at
    row["captured_at"] = None if captured is None else microseconds(captured)
    row["enrolled_at"] = microseconds(item.enrolled_at)
    row["details"] = json.dumps(item.metadata)
    return row


def request_of(new: NewItem) -> dict[str, str | None]:
    """The columns of the request that enrolls an item; null where it has no key."""
    key, sha256 = new.request or (None, None)
    return {"request_key": key, "request_sha256": sha256}


def item_of(row: Row[Any] | tuple[Any, ...]) -> Item:
    """The item of a whole row, its columns in the order of the table."""
    _, name, person, camera, captured, enrolled, *facts, details, model, _, _, polarity = tuple(row)
    modality, source, width, height, bit_depth, sha256 = facts
    return Item(
        id=name,
        person_id=person,
        camera_id=camera,
        captured_at=None if captured is None else moment_of(captured),
        enrolled_at=moment_of(enrolled),
        modality=modality,
        modality_source=source,
        width=width,
        height=height,
        bit_depth=bit_depth,
        sha256=sha256,
        metadata=json.loads(details),
        model=model,
        polarity=polarity,
    )


def columns_of(changes: ItemUpdate) -> dict[str, Any]:
    """The columns that an update writes, with their new values. Raises as `record_of`."""
    columns = changes.fields
    for name in ("person_id", "camera_id"):
        if name in columns:
            columns[name] = _label(columns[name])
    if "metadata" in columns:
        check_metadata(columns["metadata"])
        columns["details"] = json.dumps(columns.pop("metadata"))
    captured = columns.get("captured_at")
    if captured is not None:
        columns["captured_at"] = microseconds(captured)
    return columns


def _label(text: str | None) -> str | None:
    return None if text is None else normalized_label(text)


def conditions_of(filters: Filters) -> list[ColumnElement[bool]]:
    """The conditions of SQL for these filters: the same rules as `Filters.passes`."""
    conditions: list[ColumnElement[bool]] = []
    if filters.person_id:
        conditions.append(items.c.person_id.in_(storable(filters.person_id)))
    if filters.camera_id:
        conditions.append(items.c.camera_id.in_(storable(filters.camera_id)))
    if filters.exclude_camera_id:
        excluded = items.c.camera_id.in_(storable(filters.exclude_camera_id))
        conditions.append(or_(items.c.camera_id.is_(None), not_(excluded)))
    if filters.gallery_modality:
        conditions.append(items.c.modality.in_(filters.gallery_modality))
    if filters.captured_from is not None:
        conditions.append(items.c.captured_at >= microseconds(filters.captured_from))
    if filters.captured_to is not None:
        conditions.append(items.c.captured_at < microseconds(filters.captured_to))
    return [and_(*conditions)] if conditions else []


def storable(texts: Iterable[str]) -> list[str]:
    """Those texts that a database can hold: no NUL, no half of a surrogate pair."""
    return [
        text
        for text in texts
        if "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
    ]


def blocks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Values, such as row numbers, in blocks small enough for one statement's parameters."""
    for start in range(0, len(values), _VALUES_PER_STATEMENT):
        yield values[start : start + _VALUES_PER_STATEMENT]


def _uuid7(now: datetime) -> str:
    """RFC 9562: 48 bits of milliseconds, then random bits."""
    value = microseconds(now) // 1000 << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76  # version
    value = value & ~(0x3 << 62) | 0x2 << 62  # variant
    return str(UUID(int=value))


def cursor_of(number: int) -> str:
    """A row number as an opaque text, for `number_of_cursor`."""
    return base64.urlsafe_b64encode(f"after:{number}".encode()).decode()


def number_of_cursor(cursor: str) -> int:
    """The row number that `cursor_of` was given. Raises CursorInvalid for any other text."""
    try:
        kind, _, number = (
            base64.b64decode(cursor, altchars=b"-_", validate=True).decode().partition(":")
        )
        if kind == "after" and number.isascii() and number.isdigit() and len(number) < 19:
            return int(number)
    except (binascii.Error, UnicodeError, ValueError):
        pass
    raise CursorInvalid("the cursor is not one of this gallery's; start again without one")
