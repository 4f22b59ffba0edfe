"""Backups while the gallery is written to: one state of the database, in one file.

The copy is the same on both databases: a compact SQLite file, so that a backup of one can be
restored into the other. SQLite writes it from one state without its free pages (VACUUM INTO);
from PostgreSQL all rows are read in one transaction that sees one state. Nothing that was erased
before is in it. Crops of an object storage are read into the copy, so that it has every crop and
nothing of where they were; an item that was erased while they are read is left out.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from model.atomic_file import whole_file
from service.errors import BackupRunning, DatabaseUnavailable
from service.gallery.backup.archive import Manifest, check, packed, packed_size
from service.gallery.backup.contents import described
from service.gallery.backup.postgres_transfer import to_file
from service.gallery.backup.temporary_copy import primary_code, refusal, remove_leftovers, scratch
from service.gallery.storage.audit import Act, Audit
from service.gallery.storage.crops import Crops, CropsLost, patiently
from service.gallery.storage.database import FILE_NAME, Database
from service.gallery.storage.group_commit import GroupCommit
from service.gallery.storage.offline import opened
from service.gallery.storage.tables import loose_objects, object_owner, objects

_CROPS_AT_ONCE = 64  # of an object storage
_STEPS = 10_000  # of SQLite's virtual machine, between two checks whether to stop


class Backup:
    """One state of a gallery, to be read once, as blocks of about 1 MB, and then closed.

    Its copy is an unlinked file, which disappears with the process at the latest. It closes by
    itself before its last block is given: whoever has all of it can have the next one begun.
    """

    def __init__(
        self, manifest: Manifest, database: BinaryIO, key: bytes, release: Callable[[], None]
    ) -> None:
        self._manifest, self._database, self._key = manifest, database, key
        self._release = release
        self._size = packed_size(manifest, os.fstat(database.fileno()).st_size)

    @property
    def name(self) -> str:
        """A file name for it, such as cmt-backup-20261126T170000Z.zip."""
        return f"cmt-backup-{self._manifest.created_at:%Y%m%dT%H%M%SZ}.zip"

    @property
    def size(self) -> int:
        """Bytes of all blocks together."""
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        blocks = packed(self._manifest, self._database, self._key)
        held = next(blocks)
        for block in blocks:
            yield held
            held = block
        self.close()
        yield held

    def close(self) -> None:
        """Remove the copy and let the next backup begin. A second call does nothing."""
        if not self._database.closed:
            self._release()  # first: who sees that the copy is gone may begin the next one
            self._database.close()


class Backups:
    """Takes backups of one gallery, one at a time. Thread-safe.

    folder: the data folder, where the temporary copy goes unless another one is given.
    """

    def __init__(self, database: Database, audit: Audit, crops: Crops, folder: Path) -> None:
        self._database, self._audit, self._crops, self._folder = database, audit, crops, folder
        self._one = threading.Lock()
        self._copying = threading.Lock()
        self._closing = threading.Event()

    def begin(self, *, actor: str = "system", folder: Path | None = None) -> Backup:
        """Copy the gallery's present state, which takes a while → the backup, to be closed.

        Enrollments continue meanwhile. The audit log has an entry before anything is read. Raises
        BackupRunning, StorageFull and StorageUnwritable (where the copy goes: `folder`),
        GalleryDamaged (which names crops that are lost), CropsUnavailable, DatabaseUnavailable; no
        file is left behind then.
        """
        if not self._one.acquire(blocking=False):
            raise BackupRunning("a backup is being taken already; wait until that one is done")
        try:
            self._audit.append(Act(actor, "backup"))
            key = self._audit.load_key()
            with self._copying, scratch(folder or self._folder) as place:
                created_at = datetime.now(UTC)
                self._copy_to(place)
                self._bring_in(place / FILE_NAME)
                manifest = described(place / FILE_NAME, created_at)
                database = (place / FILE_NAME).open("rb")  # readable after the file is unlinked
                return Backup(manifest, database, key, self._one.release)
        except BaseException:
            self._one.release()
            raise

    def write(
        self, target: Path | BinaryIO, *, actor: str = "system", folder: Path | None = None
    ) -> None:
        """Write a backup to an open file or to a path. Raises as `begin`.

        A file at a path is complete and checked, or absent; it is readable by its owner only and
        replaces an older one.
        """
        with closing(self.begin(actor=actor, folder=folder)) as backup:
            if not isinstance(target, Path):
                for block in backup:
                    target.write(block)
                return
            try:
                with whole_file(target) as file:
                    for block in backup:
                        file.write(block)
                    check(file, target)
            except OSError as error:
                raise refusal(error, target.parent) from error

    def close(self) -> None:
        """Stop a copy in progress; a backup that `begin` has returned can still be read."""
        self._closing.set()
        with self._copying:
            pass

    def _bring_in(self, copy: Path) -> None:
        """Put the crops of the object storage into the copy. Raises CropsLost, naming all."""
        lost: list[CropsLost] = []
        with closing(sqlite3.connect(copy, isolation_level=None)) as target:
            target.execute("PRAGMA foreign_keys = ON")
            target.execute("PRAGMA secure_delete = ON")
            target.execute("PRAGMA journal_mode = OFF")  # a copy that fails is thrown away
            target.execute("PRAGMA synchronous = OFF")
            rows = target.execute("SELECT number FROM objects ORDER BY number").fetchall()
            numbers = [number for (number,) in rows]
            for start in range(0, len(numbers), _CROPS_AT_ONCE):
                if self._closing.is_set():
                    raise _closed()
                some = numbers[start : start + _CROPS_AT_ONCE]
                try:
                    found = patiently(partial(self._crops.fetch, some), self._closing.wait)
                except CropsLost as error:
                    lost.append(error)
                    continue
                target.execute("BEGIN")
                target.executemany(
                    "INSERT INTO crops (number, media_type, data) VALUES (?, ?, ?)",
                    [(number, one.media_type, one.data) for number, one in found.items()],
                )
                erased = [(number,) for number in some if number not in found]
                target.executemany("DELETE FROM items WHERE number = ?", erased)
                target.execute("COMMIT")
            if lost:
                ids = [item for error in lost for item in error.ids]
                raise CropsLost(ids, lost[0].why)
            for table in (objects, loose_objects, object_owner):
                target.execute(f"DELETE FROM {table.name}")

    def _copy_to(self, place: Path) -> None:
        if self._closing.is_set():
            raise _closed()
        if not self._database.sqlite:
            with self._database.reading() as source:
                to_file(source, place, self._closing.is_set)
            return
        connection = self._database.engine.raw_connection()  # outside of any transaction
        driver: Any = connection.driver_connection
        self._database.copying = True
        try:
            driver.set_progress_handler(self._closing.is_set, _STEPS)
            # As bytes: the name of a folder need not be UTF-8.
            driver.execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(place / FILE_NAME),))
        except sqlite3.Error as error:
            if self._closing.is_set():
                raise _closed() from error
            if primary_code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN):
                raise  # the copy failed, not the gallery
            raise self._database.explained(error) from error
        finally:
            self._database.copying = False
            driver.set_progress_handler(None, 0)
            connection.close()


def _closed() -> DatabaseUnavailable:
    return DatabaseUnavailable("the gallery was closed before its backup was done")


@contextmanager
def offline(
    folder: Path, url: str | None = None, crops_url: str | None = None
) -> Iterator[Backups]:
    """Backups of a gallery that no service has open; no checkpoint is needed.

    url, crops_url: as `CMT_DATABASE_URL` and `CMT_CROPS_URL`. Raises DatabaseUnavailable where
    there is no gallery, and as `Gallery.open` does.
    """
    with opened(folder, url) as database:
        remove_leftovers(folder)
        commits = GroupCommit(database)
        with closing(Crops(database, commits, crops_url)) as crops:
            yield Backups(database, Audit(database, commits, folder), crops, folder)
