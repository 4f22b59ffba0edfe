"""Temporary copies of a gallery. They hold personal data: private, and always removed."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import ServiceError, StorageFull, StorageUnwritable

_PREFIX = ".cmt-copy-"


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new private folder inside `folder`, removed at the end.

    An OSError or sqlite3.Error in this context is raised as StorageFull or StorageUnwritable.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder.resolve()) as place:
            yield Path(place)
    except (OSError, sqlite3.Error) as error:
        raise refusal(error, folder) from error


def remove_leftovers(folder: Path) -> None:
    """Remove the copies of processes that were killed. Hold the lock of `folder`."""
    for place in folder.glob(f"{_PREFIX}*"):
        shutil.rmtree(place, ignore_errors=True)


def refusal(error: OSError | sqlite3.Error, folder: Path) -> ServiceError:
    """The error for a file in `folder` that could not be written."""
    full = (
        error.errno in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError)
        else primary_code(error) == sqlite3.SQLITE_FULL
    )
    if full:
        return StorageFull(
            f"no space is left in {folder} for a copy of the gallery; free some and try again"
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return StorageUnwritable(f"{folder} cannot be written ({reason}); check its owner and mount")


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for an error of Python's module."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
