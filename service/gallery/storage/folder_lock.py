"""The lock of a data folder: held by one process, released with it, not inherited by a child."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from service.errors import GalleryLocked, StorageUnwritable

_held: set[int] = set()


def _drop_in_child() -> None:
    # A forked child shares the lock's open file and would keep it after its parent's death.
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_drop_in_child)


class FolderLock:
    """An exclusive flock on `folder/lock`.

    Raises GalleryLocked where another process holds it, and StorageUnwritable.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # O_CLOEXEC: a program that this process starts does not inherit it.
            self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageUnwritable(
                f"the data folder {folder} cannot be written ({error.strerror}); "
                "check its path, owner and mount"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise GalleryLocked(
                f"the data folder {folder} is in use by another process; stop that one, "
                "or speak to it with --url"
            ) from error
        _held.add(self._fd)

    def release(self) -> None:
        """Release the folder. A second call does nothing."""
        if self._fd in _held:
            _held.discard(self._fd)
            os.close(self._fd)
