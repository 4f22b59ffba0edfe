"""What `cmt watch` knows of the files in its folder: a small SQLite file that outlives it.

A row says of one version of a file (its size and time) what became of it. It is written after the
service has answered: after a crash in between, the file is sent again under the same idempotency
key, and the service answers with the item that it has.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Self

State = Literal["enrolled", "failed", "again"]
KEPT_SECONDS = 30 * 86400.0
"""How long a file is remembered that has gone: a share may not be mounted for a while."""

_APPLICATION = 0x434D5457  # "CMTW", at byte 68 of the file
_TABLE = """
CREATE TABLE IF NOT EXISTS files (
    name BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
    state TEXT NOT NULL, labels TEXT NOT NULL, item_id TEXT, code TEXT, reason TEXT,
    attempts INTEGER NOT NULL, at REAL NOT NULL, missing_since REAL
) WITHOUT ROWID
"""
_COLUMNS = (
    *("name", "size", "mtime_ns", "sha256", "state", "labels", "item_id", "code", "reason"),
    *("attempts", "at", "missing_since"),
)


class JournalError(Exception):
    """A journal that cannot be used; the message says the remedy."""


class Version(NamedTuple):
    """What tells one version of a file from another without reading it."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path) -> Self:
        """The version that is there now. Raises OSError."""
        status = file.stat()
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Row:
    """What became of a version of a file. name: its path below the folder.

    labels: with which it was sent. attempts: how often it was tried in vain. at: when, in seconds
    since 1970. missing_since: since when the file is not there any more.
    """

    name: str
    version: Version
    sha256: str
    state: State
    labels: str = ""
    item_id: str | None = None
    code: str | None = None
    reason: str | None = None
    attempts: int = 0
    at: float = 0.0
    missing_since: float | None = None


class Journal:
    """The rows of a folder, in memory and in a file that only one process has open.

    Raises JournalError, also for a file that is no journal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_content: dict[str, set[str]] = {}
        self._rows: dict[str, Row] = {}
        self._refuse_others()
        try:
            # Made by hand for its mode: names of files may be personal data.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(path, timeout=0, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error
        try:
            # The lock of the first transaction is kept, and dies with the process.
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute("BEGIN EXCLUSIVE")
            self._database.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._database.execute(_TABLE)
            self._database.execute("COMMIT")
            for row in self._database.execute(f"SELECT {', '.join(_COLUMNS)} FROM files"):
                self._remember(_row(row))
        except sqlite3.Error as error:
            self._database.close()
            raise self._unusable(error) from error

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    @property
    def rows(self) -> Mapping[str, Row]:
        """All rows, by name."""
        return self._rows

    def same_content(self, sha256: str) -> list[Row]:
        """Rows of files with this content."""
        return [self._rows[name] for name in sorted(self._by_content.get(sha256, ()))]

    def write(self, rows: Iterable[Row], gone: Iterable[str] = ()) -> None:
        """Replace rows, and forget those that are `gone`, durably. Raises JournalError."""
        rows, gone = [*rows], [name for name in gone if name in self._rows]
        if not rows and not gone:
            return
        places = ", ".join("?" * len(_COLUMNS))
        try:
            with self._database:
                self._database.execute("BEGIN")
                self._database.executemany(
                    "DELETE FROM files WHERE name = ?", [(os.fsencode(name),) for name in gone]
                )
                self._database.executemany(
                    f"REPLACE INTO files ({', '.join(_COLUMNS)}) VALUES ({places})",
                    [_cells(row) for row in rows],
                )
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        for name in gone:
            self._forget(name)
        for row in rows:
            self._forget(row.name)
            self._remember(row)

    def note_present(self, names: Collection[str]) -> None:
        """Take note of which files are there, and forget those that have long gone."""
        now = time.time()
        changed, gone = [], []
        for row in self._rows.values():
            if row.name in names:
                if row.missing_since is not None:
                    changed.append(replace(row, missing_since=None))
            elif row.missing_since is None:
                changed.append(replace(row, missing_since=now))
            elif now - row.missing_since > KEPT_SECONDS:
                gone.append(row.name)
        self.write(changed, gone)

    def _remember(self, row: Row) -> None:
        self._rows[row.name] = row
        self._by_content.setdefault(row.sha256, set()).add(row.name)

    def _forget(self, name: str) -> None:
        row = self._rows.pop(name, None)
        if row is not None:
            names = self._by_content[row.sha256]
            names.discard(name)
            if not names:
                del self._by_content[row.sha256]

    def _refuse_others(self) -> None:
        """Raise JournalError for a file that is there and no journal, a gallery's for example."""
        try:
            with self._path.open("rb") as file:
                head = file.read(72)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unusable(error) from error
        if head and head[68:72] != _APPLICATION.to_bytes(4, "big"):
            raise JournalError(
                f"{self._path} is no journal of `cmt watch`; give another place with --journal"
            )

    def _unusable(self, error: Exception) -> JournalError:
        if "locked" in str(error):
            return JournalError(
                f"another `cmt watch` has the journal {self._path} open; end it, or give this one "
                "a journal of its own with --journal"
            )
        why = error.strerror if isinstance(error, OSError) else error
        return JournalError(
            f"the journal {self._path} cannot be used ({why}); give another place with --journal, "
            "or make room for it"
        )


def _row(cells: tuple[object, ...]) -> Row:
    name, size, mtime_ns, *rest = cells
    assert isinstance(name, bytes)
    return Row(os.fsdecode(name), Version(size, mtime_ns), *rest)  # type: ignore[arg-type]


def _cells(row: Row) -> tuple[object, ...]:
    return (
        *(os.fsencode(row.name), *row.version, row.sha256, row.state, row.labels, row.item_id),
        *(row.code, row.reason, row.attempts, row.at, row.missing_since),
    )
