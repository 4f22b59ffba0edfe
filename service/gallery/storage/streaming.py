"""The gallery as caches read it: features in blocks, and what changed since a position.

Features are most of the bytes and are read at every start, so they go from the driver straight into
NumPy, without SQLAlchemy's rows. SQLite joins many rows to one answer of SQL: Python's module takes
and gives the interpreter's lock at every row, so that nothing else could go on beside the reading.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice
from operator import lt
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, func, insert, literal, select, text

from service.errors import DatabaseUnavailable, GalleryDamaged
from service.gallery.feed import FEATURE_DTYPE, Changes, Position, Slice, Stored, Witness
from service.gallery.storage.rows import blocks
from service.gallery.storage.tables import changes, features, items, models
from service.gallery.times import microseconds

BLOCK = 4096
_JOINED_BYTES = 1 << 20  # few enough to be in the CPU's cache when they are copied
_ROWS_PER_FETCH = 64  # of PostgreSQL
# PostgreSQL's COPY BINARY: a header before the first row; in each row the count of its fields and
# the field's length before its bytes; at the end a count of −1.
_COPY_HEADER, _COPY_ROW, _COPY_END = 19, 2 + 4, 2

_LABELS = (items.c.person_id, items.c.camera_id, items.c.modality, items.c.captured_at)
_SQLITE_NEWEST = "SELECT max(number) FROM features WHERE model = ?"
# Where the numbers have gaps: the last of the next rows. It reads their part of the index first,
# which takes a disk longer than to read it together with them.
_SQLITE_LAST = """
    SELECT max(number) FROM (
        SELECT f.number FROM features f WHERE f.model = ? AND f.number > ? AND {mine}
        ORDER BY f.number LIMIT ?
    )
"""
_SQLITE_FROM = """
    FROM features f CROSS JOIN items i ON i.number = f.number
    WHERE f.model = ? AND f.number > ? AND f.number <= ? AND {mine}
"""  # CROSS JOIN: SQLite keeps the order, otherwise it scans items and looks up each one's features
_SQLITE_ROWS = f"""
    SELECT f.number, i.person_id, i.camera_id, i.modality, i.captured_at, f.data
    {_SQLITE_FROM} ORDER BY f.number
"""
# The same in one row. A blob is a text to group_concat, whose bytes it takes as they are. Rows of a
# subquery, with its ORDER BY and LIMIT, would be copied once more.
_SQLITE_JOINED = f"""
    SELECT json_group_array(f.number), json_group_array(i.person_id),
        json_group_array(i.camera_id), json_group_array(i.modality),
        json_group_array(i.captured_at),
        min(length(f.data)), max(length(f.data)), CAST(group_concat(f.data, '') AS BLOB)
    {_SQLITE_FROM}
"""
CHANNEL = "cmt_gallery"
"""Of PostgreSQL's NOTIFY: replicas listen there for what others commit."""
_POSTGRES_FEATURES = """
    COPY (SELECT data FROM features WHERE model = %s AND number > %s AND number <= %s AND {mine}
          ORDER BY number) TO STDOUT (FORMAT binary)
"""


class View:
    """One state of the store, seen with one model version: all its answers agree.

    part: which items it counts and streams, None for all. Positions are those of all.
    """

    def __init__(
        self, connection: Connection, model: str, size: int, part: Slice | None = None
    ) -> None:
        self._connection, self._model, self._size = connection, model, size
        self._part = part

    def _mine(self, column: str) -> str:
        """SQL: whether this number is one of its items."""
        return "TRUE" if self._part is None else self._part.condition(column)

    def count(self) -> int:
        """Items with features of this version."""
        query = select(func.count()).select_from(features).where(features.c.model == self._model)
        query = query.where(text(self._mine("features.number")))
        return int(self._connection.execute(query).scalar_one())

    def position(self) -> Position:
        """The position of a reader that has read everything in this state.

        Raises DatabaseUnavailable for a standby, which shows what another server held before.
        """
        item = select(func.coalesce(func.max(features.c.number), 0)).where(
            features.c.model == self._model
        )
        change = select(func.coalesce(func.max(changes.c.number), 0))
        server = self._connection.dialect.name == "postgresql"
        standby = func.pg_is_in_recovery() if server else literal(value=False)
        looked = select(item.scalar_subquery(), change.scalar_subquery(), standby)
        newest, changed, behind = self._connection.execute(looked).one()
        if behind:
            raise DatabaseUnavailable(
                "the database server is a standby, which may lack what was deleted a moment ago; "
                "let CMT_DATABASE_URL name the primary, or promote this one"
            )
        return Position(int(newest), int(changed))

    def witness(self, position: Position) -> Witness:
        """The witness of a position that this state has reached."""
        item = select(items.c.id).where(items.c.number == position.item)
        change = select(changes.c.moment).where(changes.c.number == position.change)
        version = select(models.c.created_at).where(models.c.fingerprint == self._model)
        parts = (part.scalar_subquery() for part in (item, change, version))
        return Witness(*self._connection.execute(select(*parts)).one())

    def stream(self, after: int = 0, block: int = BLOCK) -> Generator[Stored, None, None]:
        """Items with features of this version and row numbers above `after`, in order.

        Each full block is followed by reading the next one in a thread, while the caller uses it.
        Close what is not read to its end before the view ends.
        """
        with closing(self._blocks(after, block)) as blocks, ThreadPoolExecutor(1) as beside:
            stored = next(blocks, None)
            while stored is not None and len(stored.numbers) == block:
                following = beside.submit(next, blocks, None)
                yield stored
                stored = following.result()
            if stored is not None:
                yield stored

    def _blocks(self, after: int, size: int) -> Generator[Stored, None, None]:
        """All blocks but the last one are full."""
        if self._connection.dialect.name == "sqlite":
            return self._sqlite_blocks(after, size)
        return self._postgres_blocks(after, size)

    def changes_since(self, position: Position) -> Changes:
        """Deletions and updates that a reader at `position` has not seen; `stream` has the rest."""
        query = select(changes.c.item, changes.c.kind).where(
            changes.c.number > position.change, changes.c.item <= position.item
        )
        deleted: set[int] = set()
        touched: set[int] = set()
        for item, kind in self._connection.execute(query):
            (deleted if kind == "delete" else touched).add(int(item))
        return Changes(sorted(deleted), self._items(sorted(touched - deleted)))

    def _items(self, numbers: Sequence[int]) -> Stored:
        query = (
            select(items.c.number, *_LABELS, features.c.data)
            .join(features, features.c.number == items.c.number)
            .where(features.c.model == self._model, text(self._mine("items.number")))
            .order_by(items.c.number)
        )
        found: list[Any] = []
        for part in blocks(numbers):
            found += self._connection.execute(query.where(items.c.number.in_(part))).all()
        block = _Block(len(found), self._size)
        if found:
            *labels, rows = zip(*found, strict=True)
            block.add_labels(labels)
            block.add_features(_joined(rows, labels[0], block.width))
        return block.stored()

    def _sqlite_blocks(self, after: int, size: int) -> Generator[Stored, None, None]:
        driver: Any = self._connection.connection.driver_connection
        at_once = max(1, _JOINED_BYTES // (self._size * FEATURE_DTYPE.itemsize))
        gaps = _SQLITE_LAST.format(mine=self._mine("f.number"))
        block: _Block | None = None
        dense = True
        with closing(driver.cursor()) as cursor:
            newest = cursor.execute(_SQLITE_NEWEST, (self._model,)).fetchone()[0] or 0
            while after < newest:
                if block is None:  # no larger than what is there
                    block = _Block(min(size, newest - after), self._size)
                last = after + min(at_once, block.room)
                if not dense:
                    found = cursor.execute(gaps, (self._model, after, last - after))
                    last = found.fetchone()[0] or newest
                labels, data = self._sqlite_rows(cursor, after, last)
                block.add_labels(labels)
                block.add_features(data)
                dense = 2 * len(labels[0]) > last - after
                after = last
                if not block.room:
                    yield block.stored()
                    block = None
            if block is not None and len(block):
                yield block.stored()

    def _sqlite_rows(
        self, cursor: Any, after: int, last: int
    ) -> tuple[Sequence[Sequence[Any]], bytes]:
        """Rows up to `last`: number and four labels as columns, and their features' bytes."""
        mine, values = self._mine("f.number"), (self._model, after, last)
        cursor.execute(_SQLITE_JOINED.format(mine=mine), values)
        *columns, least, most, data = cursor.fetchone()
        labels = [json.loads(column) for column in columns]
        numbers = labels[0]
        if not numbers:
            return labels, b""
        width = self._size * FEATURE_DTYPE.itemsize
        # SQLite promises no order here, and takes the one of the index.
        if least == most == width and len(data) == width * len(numbers) and _ascend(numbers):
            return labels, data
        # This tells which row is damaged; and another SQLite may join bytes otherwise.
        cursor.execute(_SQLITE_ROWS.format(mine=mine), values)
        *labels, rows = zip(*cursor, strict=True)
        return labels, _joined(rows, labels[0], width)

    def _postgres_blocks(self, after: int, size: int) -> Generator[Stored, None, None]:
        driver: Any = self._connection.connection.driver_connection
        labels = (
            select(features.c.number, *_LABELS)
            .join(items, items.c.number == features.c.number)
            .where(features.c.model == self._model, text(self._mine("features.number")))
            .order_by(features.c.number)
            .limit(size)
        )
        copied = _POSTGRES_FEATURES.format(mine=self._mine("number"))
        while rows := self._connection.execute(labels.where(features.c.number > after)).all():
            block = _Block(len(rows), self._size)
            block.add_labels(zip(*rows, strict=True))
            until = rows[-1].number
            # The same rows in the same order: the transaction sees one state of the database.
            with (
                driver.cursor() as cursor,
                cursor.copy(copied, (self._model, after, until)) as copy,
            ):
                messages = _copied(copy)
                while part := list(islice(messages, _ROWS_PER_FETCH)):
                    start = len(block)
                    numbers = [row.number for row in rows[start : start + len(part)]]
                    block.add_features(_joined(part, numbers, block.width))
            yield block.stored()
            after = until


def checked(rows: npt.NDArray[np.float16], count: int, size: int | None) -> npt.NDArray[np.float16]:
    """Features in the form that is stored. Raises ValueError for another shape or if not finite."""
    if rows.ndim != 2 or len(rows) != count or (size is not None and rows.shape[1] != size):
        raise ValueError(
            f"features of shape {rows.shape} for {count} items of "
            f"{'P·D' if size is None else size} numbers each"
        )
    half = rows.astype(FEATURE_DTYPE, copy=False)
    if not np.isfinite(half).all():
        raise ValueError("features are not finite in fp16; the checkpoint is damaged or untrained")
    return half


def record_changes(connection: Connection, numbers: Sequence[int], kind: str) -> None:
    """Record changes of enrolled items, for caches. kind: "delete", "labels" or "features"."""
    if numbers:
        moment = microseconds(datetime.now(UTC))
        rows = [{"item": number, "kind": kind, "moment": moment} for number in numbers]
        connection.execute(insert(changes), rows)
        announce(connection)


def announce(connection: Connection) -> None:
    """Wake the other replicas once the caller's transaction is committed: it gives them something.

    Who misses it finds the change by itself a moment later (`Replicas`).
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_notify(CHANNEL, "")))


class _Block:
    """`Stored` while it is filled, with space for `rows` rows."""

    def __init__(self, rows: int, size: int) -> None:
        self._columns: tuple[list[Any], ...] = ([], [], [], [], [])
        self._features = np.empty((rows, size), FEATURE_DTYPE)
        self._bytes = self._features.reshape(-1).data.cast("B")
        self.width = size * FEATURE_DTYPE.itemsize
        self._filled = 0

    def __len__(self) -> int:
        return self._filled

    @property
    def room(self) -> int:
        return len(self._features) - self._filled

    def add_labels(self, columns: Iterable[Sequence[Any]]) -> None:
        """Append columns: numbers, persons, cameras, modalities and times of the next rows."""
        for mine, more in zip(self._columns, columns, strict=True):
            mine.extend(more)

    def add_features(self, data: bytes) -> None:
        """Append the features' bytes of whole rows."""
        start = self._filled * self.width
        self._bytes[start : start + len(data)] = data
        self._filled += len(data) // self.width

    def stored(self) -> Stored:
        """The filled rows; the block must not be used afterwards."""
        numbers, persons, cameras, modalities, captured = self._columns
        rows = self._features[: self._filled]
        return Stored(numbers, persons, cameras, modalities, captured, rows)


def _ascend(numbers: Sequence[int]) -> bool:
    return all(map(lt, numbers, islice(numbers, 1, None)))


def _joined(rows: Sequence[Any], numbers: Sequence[int], width: int) -> bytes:
    """The features' bytes of rows of these numbers. Raises GalleryDamaged."""
    if set(map(len, rows)) != {width}:
        number = next(n for n, row in zip(numbers, rows, strict=False) if len(row) != width)
        raise GalleryDamaged(
            f"the features of row {number} do not have {width} bytes; restore a backup"
        )
    return b"".join(rows)


def _copied(copy: Iterable[Any]) -> Iterator[Any]:
    """The only field of each row of a COPY BINARY; psycopg gives a row, or less, at a time."""
    skip = _COPY_HEADER
    for message in copy:
        row = message[skip:]
        skip = 0
        if len(row) > _COPY_END:
            yield row[_COPY_ROW:]
