"""Restore a backup into an empty gallery, completely or not at all.

The whole backup is checked in a temporary folder before anything is changed. An SQLite database is
then renamed into its place; a PostgreSQL database is filled in one transaction. A process that is
killed before that leaves an empty gallery.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import Connection, inspect, literal, select

from model.atomic_file import sync_folder, whole_file
from service.errors import BackupInvalid, GalleryDamaged, GalleryNotEmpty
from service.gallery.backup.archive import Manifest, damaged, unpack
from service.gallery.backup.contents import (
    ContentsError,
    check_labels,
    check_rows,
    described,
)
from service.gallery.backup.postgres_transfer import from_file
from service.gallery.backup.temporary_copy import remove_leftovers, scratch
from service.gallery.index import snapshot
from service.gallery.storage.audit import KEY_FILE, Act, read_key, write
from service.gallery.storage.database import FILE_NAME, Database, address_of, known_revisions
from service.gallery.storage.folder_lock import LOCK_FILE, FolderLock
from service.gallery.storage.private_files import tighten
from service.gallery.storage.tables import schema

_BESIDE = ("", "-wal", "-shm", "-journal")  # files of one SQLite database


def restore(
    backup: Path, folder: Path, url: str | None = None, *, actor: str = "system"
) -> Manifest:
    """Fill an empty gallery with a backup's rows, keys and numbers → the backup's manifest.

    folder: the data folder, created if missing. url: as `CMT_DATABASE_URL`; without it the gallery
    becomes the SQLite database in `folder`. The audit log gets one more entry. The folder of the
    database needs as much space as the backup has; on PostgreSQL the data folder does.

    Raises BackupInvalid, GalleryNotEmpty, GalleryLocked (a service has the folder open),
    StorageFull, StorageUnwritable, DatabaseUnavailable, GalleryVersion.
    """
    address = address_of(folder, url)
    with _locked(folder):
        tighten(folder)
        if address.get_backend_name() != "sqlite":
            return _to_server(backup, folder, url, actor)
        file = Path(str(address.database)).resolve()
        if file.parent == folder.resolve():
            return _to_file(backup, folder, file, actor)
        with _locked(file.parent):
            return _to_file(backup, folder, file, actor)


def _to_file(backup: Path, folder: Path, file: Path, actor: str) -> Manifest:
    for end in _BESIDE:
        if (part := file.with_name(file.name + end)).exists():
            raise GalleryNotEmpty(
                f"{part} is there already and a backup is restored into an empty gallery only; "
                "give a new data folder, or move that file away"
            )
    with scratch(file.parent) as place:
        manifest = _checked(backup, place, actor)
        _place_key(place / KEY_FILE, folder / KEY_FILE)
        snapshot.remove(folder / snapshot.FOLDER)  # a cache of what was here before
        (place / FILE_NAME).rename(file)
        sync_folder(file.parent)
    return manifest


def _to_server(backup: Path, folder: Path, url: str | None, actor: str) -> Manifest:
    with closing(Database(folder, url, migrate=False)) as database:
        with database.reading() as connection:
            _refuse_rows(connection)
        with scratch(folder) as place:
            manifest = _checked(backup, place, actor)
            database.migrate()
            snapshot.remove(folder / snapshot.FOLDER)
            with database.writing() as connection:
                _refuse_rows(connection)  # again, now that nobody else can write
                from_file(place / FILE_NAME, (place / KEY_FILE).read_bytes(), connection)
    return manifest


def _checked(backup: Path, place: Path, actor: str) -> Manifest:
    """Unpack a backup into `place`, checked, with the newest tables and an audit entry."""
    manifest = unpack(backup, place)
    try:
        found = described(place / FILE_NAME, manifest.created_at)
    except (sqlite3.Error, ValidationError) as error:
        raise damaged(backup, "its database is none of a gallery") from error
    if found != manifest.model_copy(update={"members": {}}):
        raise damaged(backup, "its database is another than its manifest says")
    if manifest.revision not in known_revisions():
        raise BackupInvalid(
            f"{backup} was written by a newer release, with tables of revision "
            f"{manifest.revision}; restore it with that release"
        )
    try:
        read_key(place / KEY_FILE)
    except GalleryDamaged as error:
        raise damaged(backup, f"its {KEY_FILE} is no key") from error
    try:
        check_rows(place / FILE_NAME)
        with closing(Database(place)) as database:
            with database.reading() as connection:
                check_labels(connection)
            with database.writing() as connection:
                details = {"created_at": manifest.created_at.isoformat()}
                write(connection, [Act(actor, "restore", details=details)])
            database.truncate_log()  # now the file alone is complete
    except ContentsError as error:
        raise BackupInvalid(
            f"the backup {backup} is damaged or was changed, for no gallery writes such a row: "
            f"{error}; use another one"
        ) from error
    except sqlite3.Error as error:
        raise damaged(backup, f"its database cannot be read: {error}") from error
    return manifest


def _place_key(source: Path, target: Path) -> None:
    """Write the key before the database, which would otherwise get a new one and new pseudonyms."""
    key = source.read_bytes()
    if not target.exists():
        with whole_file(target) as file:
            file.write(key)
    elif not target.is_file() or target.read_bytes() != key:
        raise GalleryNotEmpty(
            f"{target} is the key of another gallery's audit log; give a new data folder, or move "
            "that file away"
        )


def _refuse_rows(connection: Connection) -> None:
    there = set(inspect(connection).get_table_names())
    for table in schema.sorted_tables:
        first = select(literal(1)).select_from(table).limit(1)
        if table.name in there and connection.execute(first).first() is not None:
            raise GalleryNotEmpty(
                f"the table {table.name} of the database has rows and a backup is restored into "
                "an empty gallery only; give the URL of a new database"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        lock = FolderLock(folder)
        try:
            remove_leftovers(folder)
            yield
        finally:
            lock.release()
    except BaseException:
        _unmake(missing)
        raise


def _unmake(made: Sequence[Path]) -> None:
    """Remove folders that were made for nothing, from the innermost on; a gallery's stays."""
    for folder in made:
        with suppress(OSError):
            if {file.name for file in folder.iterdir()} <= {LOCK_FILE, KEY_FILE}:
                for file in folder.iterdir():
                    file.unlink()
            folder.rmdir()
