"""The database of a gallery that no service has open; no checkpoint is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import inspect

from service.errors import DatabaseUnavailable
from service.gallery.storage.crops import INLINE_BYTES, Crops
from service.gallery.storage.database import Database, address_of
from service.gallery.storage.folder_lock import FolderLock
from service.gallery.storage.group_commit import GroupCommit
from service.kit.urls import without_password


@contextmanager
def opened(folder: Path, url: str | None = None) -> Iterator[Database]:
    """A gallery's database with the newest tables, its data folder locked.

    Raises DatabaseUnavailable where there is no gallery, and as `Gallery.open` does.
    """
    address = address_of(folder, url)
    nothing = DatabaseUnavailable(
        f"there is no gallery at {without_password(address)}; check the data folder and the "
        "database URL"
    )
    if address.get_backend_name() == "sqlite" and not Path(str(address.database)).is_file():
        raise nothing
    lock = FolderLock(folder)
    try:
        with closing(Database(folder, url, migrate=False)) as database:
            with database.reading() as connection:
                if not inspect(connection).has_table("items"):
                    raise nothing
            database.migrate()
            yield database
    finally:
        lock.release()


@contextmanager
def opened_crops(
    folder: Path, url: str | None, crops_url: str | None, inline_bytes: int = INLINE_BYTES
) -> Iterator[Crops]:
    """Where a gallery's crops are, to move them. Raises as `opened` and `Crops.start`."""
    with (
        opened(folder, url) as database,
        closing(Crops(database, GroupCommit(database), crops_url, inline_bytes)) as crops,
    ):
        crops.start()
        yield crops
