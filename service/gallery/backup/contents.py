"""What the database of a backup holds, which anybody may have changed since.

A backup is restored only if every row is one that a gallery could have written: what is wrong would
show much later, in a search or where a caller reads an item. Facts, features, metadata and labels
are checked completely. Of a crop the header is read, not the pixels: that takes a fraction of a
millisecond, and decoding would take minutes for a hundred thousand of them.
"""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection, select

from model.labels import MAX_LABEL, cleaned_label
from service.gallery.backup.archive import Manifest
from service.gallery.feed import FEATURE_DTYPE
from service.gallery.metadata import METADATA_BYTES, check_metadata
from service.gallery.storage.tables import (
    AUDIT_TRIGGERS,
    cameras,
    items,
    loose_objects,
    object_owner,
    objects,
)
from service.gallery.times import moment_of
from service.images.header import read_header

_ROWS = 500  # of features that are looked at together

Check = Callable[[Any], bool]


class ContentsError(Exception):
    """A row that no gallery would have written; the message names it."""


def described(database: Path, created_at: datetime) -> Manifest:
    """The manifest of a copy, without its members. Raises sqlite3.Error."""
    with closing(read_only(database)) as connection:
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        if not all(_is_ours(*row) for row in rows):
            raise sqlite3.DatabaseError("it has more than tables, indexes and their triggers")
        names = {name for kind, name, _ in rows if kind == "table" and name.isidentifier()}
        names -= {"alembic_version", "secrets", "sqlite_sequence"}
        triggers = {name for kind, name, _ in rows if kind == "trigger"}
        if cameras.name in names and triggers != AUDIT_TRIGGERS.keys():  # of the same migration
            raise sqlite3.DatabaseError("its audit log could be changed")

        def first(statement: str) -> Any:
            row = connection.execute(statement).fetchone()
            return None if row is None else row[0]

        return Manifest(
            created_at=created_at,
            revision=str(first("SELECT version_num FROM alembic_version")),
            active=first("SELECT fingerprint FROM models WHERE state = 'active'"),
            counts={name: first(f"SELECT count(*) FROM {name}") for name in sorted(names)},
        )


def _is_ours(kind: str, name: str, sql: str | None) -> bool:
    """Whether a part of a database is one that a gallery has; a view or a trigger may run SQL."""
    if kind == "trigger":
        return AUDIT_TRIGGERS.get(name) == sql
    return kind in ("table", "index") and "VIRTUAL" not in (sql or "")


def read_only(database: Path) -> sqlite3.Connection:
    """A connection that creates no file next to the database."""
    return sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)


def check_rows(database: Path) -> None:
    """Check all but the spelling of labels, before a migration.

    Raises ContentsError, and sqlite3.Error where tables or columns are missing.
    """
    with closing(read_only(database)) as connection:
        connection.text_factory = _text
        for table, facts in _FACTS.items():
            _check_facts(connection, table, facts)
        for column in ("id", "request_key"):
            _refuse_found(
                connection,
                f"SELECT max(number) FROM items GROUP BY {column} "
                f"HAVING {column} IS NOT NULL AND count(*) > 1",
                f"has the {column} of another",
            )
        _refuse_objects(connection)
        _check_crops(connection)
        _check_features(connection)


def check_labels(connection: Connection) -> None:
    """Check labels, after the migration that respells those of older releases.

    Raises ContentsError.
    """
    for column in (items.c.person_id, items.c.camera_id, cameras.c.camera_id):
        for label in connection.execute(select(column).distinct()).scalars():
            if label is not None and not _is_label(label):
                if column.table is cameras:
                    raise ContentsError("a camera_id of the table cameras is no label")
                found = connection.execute(select(items.c.id).where(column == label).limit(1))
                raise ContentsError(f"the {column.name} of item {found.scalar_one()} is no label")


def _is_label(label: str) -> bool:
    """Whether a label is one, or one of an older release of which a migration can leave nothing."""
    cleaned = cleaned_label(label)
    if cleaned is not None:
        return cleaned == label
    controls = any(unicodedata.category(character) == "Cc" for character in label)
    return 0 < len(label) <= MAX_LABEL and not controls


# --- facts: one value at a time ---


class _NoText:
    """In place of a text that is no UTF-8."""


def _text(data: bytes) -> str | _NoText:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return _NoText()


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1_000 and "\0" not in value


def _is_moment(value: Any) -> bool:
    try:
        return isinstance(value, int) and moment_of(value) is not None
    except OverflowError:
        return False


def _is_object(value: Any) -> bool:
    return value == "{}" or isinstance(_parsed(value), dict)


def _is_metadata(value: Any) -> bool:
    try:
        if value != "{}":
            check_metadata(_parsed(value))
    except ValueError:
        return False
    return True


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None


def _fits(pattern: str) -> Check:
    whole = re.compile(pattern, re.ASCII).fullmatch
    return lambda value: isinstance(value, str) and whole(value) is not None


def _among(*choices: object) -> Check:
    return lambda value: value in choices


def _above(least: int) -> Check:
    return lambda value: isinstance(value, int) and value >= least


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


_POLARITIES = (None, "white_hot", "black_hot")
_FINGERPRINT, _SHA256 = _fits("[0-9a-f]{1,64}"), _fits("[0-9a-f]{64}")
# Table → column → what its values may be. Rows are named by the first column, or their number.
_FACTS: Mapping[str, Mapping[str, Check]] = {
    "items": {
        "id": _fits("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        "person_id": _or_null(_is_text),
        "camera_id": _or_null(_is_text),
        "captured_at": _or_null(_is_moment),
        "enrolled_at": _is_moment,
        "modality": _among("rgb", "ir"),
        "modality_source": _among("given", "camera", "detected"),
        "width": _above(1),
        "height": _above(1),
        "bit_depth": _among(*range(1, 65)),
        "sha256": _SHA256,
        "details": _is_metadata,
        "model": _FINGERPRINT,
        "request_key": _or_null(_is_text),
        "request_sha256": _or_null(_SHA256),
        "polarity": _among(*_POLARITIES),
    },
    "models": {
        "fingerprint": _FINGERPRINT,
        "configuration": _or_null(_is_object),
        "created_at": _is_moment,
        "state": _among("building", "active", "retired"),
    },
    "cameras": {
        "camera_id": _is_text,
        "modality": _among(None, "auto", "rgb", "ir"),
        "polarity": _among(*_POLARITIES),
    },
    "clock": {"id": _above(0), "moment": _is_moment},
    "undated": {"number": _above(1), "seen_at": _or_null(_is_moment)},
    "changes": {
        "number": _above(1),
        "item": _above(1),
        "kind": _among("delete", "labels", "features"),
        "moment": _is_moment,
    },
    "audit": {
        "number": _above(1),
        "moment": _is_moment,
        "actor": _is_text,
        "action": _is_text,
        "subject": _or_null(_is_text),
        "details": _is_object,
    },
    "sqlite_sequence": {"name": _is_text, "seq": _above(0)},
}
# What older releases do not have.
_LATER = {
    ("items", "polarity"),
    *((table, name) for table in ("cameras", "clock", "undated") for name in _FACTS[table]),
}
_MEANING = {
    "details": f"JSON object that may be stored, of at most {METADATA_BYTES} bytes",
    "id": "UUID",
}


def _check_facts(connection: sqlite3.Connection, table: str, facts: Mapping[str, Check]) -> None:
    there = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
    names = [name for name in facts if name in there or (table, name) not in _LATER]
    if not names:
        return
    checks = [facts[name] for name in names]
    for row in connection.execute(f"SELECT rowid, {', '.join(names)} FROM {table}"):
        for name, value, check in zip(names, row[1:], checks, strict=True):
            if not check(value):
                owner = _named(table, row[0], row[1] if checks[0](row[1]) else None)
                kind = _MEANING.get(name) if table == "items" else None
                raise ContentsError(f"the {name} of {owner} is no {kind or 'valid one'}")


def _named(table: str, number: int, name: str | None = None) -> str:
    if table == "items":
        return f"item {number}" if name is None else f"item {name}"
    return f"row {number} of the table {table}"


# --- crops and features ---


def _check_crops(connection: sqlite3.Connection) -> None:
    _refuse_found(
        connection,
        "SELECT number FROM crops WHERE number NOT IN (SELECT number FROM items)",
        "has a crop and no row",
    )
    rows = connection.execute(
        "SELECT items.number, items.id, crops.media_type, typeof(crops.data), width, height "
        "FROM items LEFT JOIN crops ON crops.number = items.number"
    )
    for number, name, media_type, kind, width, height in rows:
        problem = "has no crop"
        if kind == "blob":
            with connection.blobopen("crops", "data", number, readonly=True) as data:
                problem = _crop_problem(data, media_type, (width, height))
        if problem:
            raise ContentsError(f"item {name} {problem}")


def _refuse_objects(connection: sqlite3.Connection) -> None:
    """Refuse names of objects: a backup has every crop, and may delete nothing where they were."""
    for table in (objects, loose_objects, object_owner):
        there = connection.execute(f"PRAGMA table_info({table.name})").fetchone()
        if there and connection.execute(f"SELECT 1 FROM {table.name} LIMIT 1").fetchone():
            raise ContentsError(f"the table {table.name} of a backup is empty, and here it is not")


def _crop_problem(data: Any, media_type: Any, size: tuple[int, int]) -> str:
    try:
        header = read_header(data)
    except ValueError:
        return "has a crop that is no image"
    if header.media_type != media_type:
        return f"has a crop that is {header.media_type} and not what its row says"
    if sorted((header.width, header.height)) != sorted(size):  # an orientation may swap them
        return (
            f"has a crop of {header.width}×{header.height} pixels, and its row says "
            f"{size[0]}×{size[1]}"
        )
    return ""


def _check_features(connection: sqlite3.Connection) -> None:
    _refuse_found(
        connection,
        "SELECT number FROM features WHERE number NOT IN (SELECT number FROM items)",
        "has features and no row",
    )
    _refuse_found(
        connection,
        "SELECT number FROM features WHERE model NOT IN (SELECT fingerprint FROM models)",
        "has features of a checkpoint that the gallery does not know",
    )
    _refuse_found(
        connection,
        "SELECT items.number FROM items, models WHERE state = 'active' AND NOT EXISTS (SELECT 1 "
        "FROM features WHERE features.number = items.number AND model = fingerprint)",
        "has no features of the checkpoint in use",
    )
    sizes = {
        fingerprint: _size(_parsed(configuration))
        for fingerprint, configuration in connection.execute(
            "SELECT fingerprint, configuration FROM models"
        )
    }
    rows = connection.execute("SELECT number, model, data FROM features")
    while block := rows.fetchmany(_ROWS):
        for number, model, data in block:
            # Where the configuration is unknown, all are as long as the first.
            if isinstance(data, bytes):
                sizes[model] = sizes[model] or len(data)
            if not isinstance(data, bytes) or len(data) != sizes[model] or len(data) % 2:
                name = _id_of(connection, number)
                raise ContentsError(f"item {name} has features of another length than its model")
        if not _finite(data for _, _, data in block):
            number = next(number for number, _, data in block if not _finite([data]))
            raise ContentsError(
                f"item {_id_of(connection, number)} has features that are infinite or no numbers"
            )


def _size(configuration: Any) -> int | None:
    """Bytes of an item's features, where a checkpoint's configuration says it."""
    if not isinstance(configuration, dict):
        return None
    parts, dim = configuration.get("parts"), configuration.get("dim")
    if not isinstance(parts, int) or not isinstance(dim, int):
        return None
    return parts * dim * FEATURE_DTYPE.itemsize


def _finite(rows: Sequence[bytes] | Any) -> bool:
    return bool(np.isfinite(np.frombuffer(b"".join(rows), FEATURE_DTYPE)).all())


def _refuse_found(connection: sqlite3.Connection, numbers: str, problem: str) -> None:
    """Raise ContentsError for the first item whose number a query gives."""
    found = connection.execute(f"{numbers} LIMIT 1").fetchone()
    if found is not None:
        raise ContentsError(f"item {_id_of(connection, found[0])} {problem}")


def _id_of(connection: sqlite3.Connection, number: int) -> str:
    found = connection.execute("SELECT id FROM items WHERE number = ?", (number,)).fetchone()
    return f"number {number}" if found is None else str(found[0])
