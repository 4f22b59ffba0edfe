"""A gallery that much is added to and that nothing is searched in: no feature is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path

from sqlalchemy import select

from model import CheckpointInfo
from service.errors import ModelVersionConflict
from service.gallery.backup.temporary_copy import remove_leftovers
from service.gallery.storage.crops import INLINE_BYTES
from service.gallery.storage.database import Database
from service.gallery.storage.folder_lock import FolderLock
from service.gallery.storage.private_files import tighten
from service.gallery.storage.store import Store
from service.gallery.storage.tables import models


@contextmanager
def filling(
    folder: Path,
    info: CheckpointInfo,
    *,
    database_url: str | None = None,
    clock_confirmed: date | None = None,
    crops_url: str | None = None,
    crops_inline_bytes: int = INLINE_BYTES,
) -> Iterator[Store]:
    """The store of a gallery, made if missing; arguments as of `Gallery.open`.

    Memory does not grow with the gallery, and services that share its database follow what is
    added. Raises as `Gallery.open`, and ModelVersionConflict where the gallery is searched with
    another checkpoint.
    """
    lock = FolderLock(folder)
    try:
        tighten(folder)
        remove_leftovers(folder)
        active = select(models.c.fingerprint).where(models.c.state == "active")
        database = Database(folder, database_url, lock=lock)
        with closing(database), database.reading() as connection:
            used = connection.execute(active).scalar_one_or_none()
        if used not in (None, info.fingerprint):
            raise ModelVersionConflict(
                f"the gallery is searched with the checkpoint {used[:12]} and these are features "
                f"of {info.fingerprint[:12]}; embed the pictures with the gallery's checkpoint"
            )
        store = Store(
            *(folder, info.fingerprint, info.config.embedding_size, database_url),
            configuration=info.config.model_dump(mode="json"),
            lock=lock,
            confirmed=clock_confirmed,
            crops_url=crops_url,
            crops_inline_bytes=crops_inline_bytes,
        )
        with closing(store):
            yield store
    finally:
        lock.release()
