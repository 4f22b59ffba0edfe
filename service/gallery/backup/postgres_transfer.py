"""The tables' rows from a PostgreSQL database into the SQLite file of a backup, and back.

Only a few rows are in memory at a time. Row numbers are kept, and so is the last one ever given, so
that the number of a deleted row is not used again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, LargeBinary, Table, func, insert, select, text

from service.errors import DatabaseUnavailable
from service.gallery.backup.contents import read_only
from service.gallery.storage.audit import KEY_NAME
from service.gallery.storage.database import FILE_NAME, Database
from service.gallery.storage.tables import schema, secrets

# A crop may have 20 MB; rows without such columns are short.
_ROWS, _ROWS_WITH_BYTES = 1000, 16


def to_file(source: Connection, folder: Path, stopped: Callable[[], bool]) -> None:
    """Write everything that the transaction `source` sees into a new SQLite database in `folder`.

    stopped: called before every block of rows. Raises DatabaseUnavailable once it returns True.
    """
    Database(folder).close()  # makes the tables
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as target:
        target.execute("PRAGMA journal_mode = DELETE")  # this file alone must be complete
        target.execute("PRAGMA synchronous = OFF")  # it is synced as part of the backup
        target.execute("BEGIN")
        for table in _carried():
            marks = ", ".join("?" for _ in table.columns)
            target.executemany(
                f"INSERT INTO {table.name} ({_names(table)}) VALUES ({marks})",
                _rows(source, table, stopped),
            )
        target.execute("DELETE FROM sqlite_sequence")
        for table in _carried():
            if table.autoincrement_column is not None:
                last = _last_number(source, table)
                target.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", (table.name, last))
        target.execute("COMMIT")


def from_file(file: Path, key: bytes, target: Connection) -> None:
    """Copy a backup's database of the newest schema and its key into empty tables."""
    driver: Any = target.connection.driver_connection
    with closing(read_only(file)) as source, driver.cursor() as cursor:
        for table in _carried():
            rows = source.execute(f"SELECT {_names(table)} FROM {table.name}")
            with cursor.copy(f"COPY {table.name} ({_names(table)}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
        last = dict(source.execute("SELECT name, seq FROM sqlite_sequence").fetchall())
    for table in _carried():
        if (column := table.autoincrement_column) is not None:
            number = last.get(table.name, 0)
            sequence = func.pg_get_serial_sequence(table.name, column.name)
            # The last value must be at least 1; False: not even that has been given yet.
            target.execute(select(func.setval(sequence, max(number, 1), number > 0)))
    target.execute(insert(secrets).values(name=KEY_NAME, data=key))


def _carried() -> list[Table]:
    """Tables in an order that foreign keys allow; keys are members of their own."""
    return [table for table in schema.sorted_tables if table is not secrets]


def _names(table: Table) -> str:
    return ", ".join(table.columns.keys())


def _rows(
    source: Connection, table: Table, stopped: Callable[[], bool]
) -> Iterator[tuple[Any, ...]]:
    """All rows, by a cursor of the server."""
    has_bytes = any(isinstance(column.type, LargeBinary) for column in table.columns)
    options = {"yield_per": _ROWS_WITH_BYTES if has_bytes else _ROWS}
    query = select(table).order_by(*table.primary_key.columns)
    for rows in source.execute(query, execution_options=options).partitions():
        if stopped():
            raise DatabaseUnavailable("the gallery was closed before its backup was done")
        yield from map(tuple, rows)


def _last_number(source: Connection, table: Table) -> int:
    """The last row number ever given, even to a row deleted since; 0 if none was."""
    column = table.autoincrement_column
    assert column is not None
    sequence = source.execute(
        select(func.pg_get_serial_sequence(table.name, column.name))
    ).scalar_one()
    last, given = source.execute(text(f"SELECT last_value, is_called FROM {sequence}")).one()
    return int(last) if given else int(last) - 1
