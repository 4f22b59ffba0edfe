"""The SQLite file of a gallery: its connections, all of them to the same file and the same log."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from service.errors import StorageFull, StorageUnwritable
from service.gallery.storage.open_file import OpenFile
from service.gallery.storage.private_files import FILE, private_file

BUSY_SECONDS = 30
_LOG = "-wal"


class SqliteFile:
    """A database file that is there, made private where it is new, and connections to it.

    One connection stays open from the start to `close`, so that the log stays the same file.
    Raises StorageUnwritable and sqlite3.Error.
    """

    def __init__(self, path: Path) -> None:
        self._path = os.path.abspath(path)  # noqa: PTH100 - keeps links, which may be changed
        try:
            private_file(self._path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(
                    f"no space is left for the database {path}; free some and try again"
                ) from error
            raise StorageUnwritable(
                f"the database {path} cannot be written ({error.strerror}); check the path, owner "
                "and mount of the file and its folder"
            ) from error
        self._keep_private()
        self._first = self._opened()
        try:
            # Now that it is open for writing: an overlay file system copies it when that happens.
            self._files = (
                OpenFile("the database file", lambda: self._path),
                OpenFile("the log of the database file", self._log),
            )
        except BaseException:
            self.close()
            raise

    def connect(self) -> sqlite3.Connection:
        """Open one more connection, in autocommit mode. Raises StorageMoved and sqlite3.Error."""
        # SQLite goes by names: it would open, or make, whatever has them now.
        self.check()
        connection = self._opened()
        try:
            self.check()
        except BaseException:
            connection.close()
            raise
        return connection

    def _opened(self) -> sqlite3.Connection:
        """A connection to the file that has the name now, with its log open."""
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(self._path))}?mode=rw",
            uri=True,
            timeout=BUSY_SECONDS,
            # Python's module would begin transactions by its own rules: never before a SELECT.
            isolation_level=None,
            check_same_thread=False,  # SQLAlchemy's pool gives it to one thread at a time
        )
        try:
            cursor = connection.cursor()
            # Readers continue while a writer commits.
            (mode,) = cursor.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise StorageUnwritable(
                    f"the file system of {self._path} cannot hold the log of a database; use a "
                    "local disk, or PostgreSQL"
                )
            cursor.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
            cursor.execute("PRAGMA secure_delete = ON")  # deleted pages are overwritten with zeros
            cursor.execute("PRAGMA foreign_keys = ON")
            cursor.execute("PRAGMA schema_version").fetchone()  # opens the log, too
            cursor.close()
        except BaseException:
            connection.close()
            raise
        return connection

    def check(self) -> None:
        """Raise StorageMoved unless a restart would find the same database and the same log."""
        for file in self._files:
            file.check()

    def copy_log(self) -> None:
        """Copy what the log holds into the database file, where the log has lost its name.

        A stop in order does that too; a process that is killed cannot. Raises sqlite3.Error.
        """
        self._first.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """Close the first connection; those of `connect` must be closed before."""
        self._first.close()

    def _log(self) -> str:
        # SQLite follows links and keeps the log beside the file. To know that the file's own name
        # is none takes one system call, which every write pays twice.
        path = self._path
        return (os.path.realpath(path) if os.path.islink(path) else path) + _LOG  # noqa: PTH114

    def _keep_private(self) -> None:
        for end in ("", _LOG, "-shm"):
            with suppress(OSError):  # not there, or `private_files.tighten` has told
                os.chmod(self._path + end, FILE)  # noqa: PTH101
