"""The lock of a data folder: held by one process, released with it, not inherited by a child."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from service.errors import GalleryLocked, StorageUnwritable
from service.gallery.storage.open_file import OpenFile
from service.gallery.storage.private_files import private_file, private_folder

LOCK_FILE = "lock"
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
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
        path = str(folder.absolute() / LOCK_FILE)
        try:
            private_folder(folder)
            private_file(path)
            # O_CLOEXEC: a program that this process starts does not inherit it.
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise StorageUnwritable(
                f"the data folder {folder} cannot be written ({error.strerror}); "
                "check its path, owner and mount"
            ) from error
        try:
            take_lock(self._fd, folder)
            self._file = OpenFile("the lock of the data folder", lambda: path)
        except BaseException:
            os.close(self._fd)
            raise
        _held.add(self._fd)

    def check(self) -> None:
        """Raise StorageMoved where the lock no longer keeps others out of the folder."""
        self._file.check()

    def release(self) -> None:
        """Release the folder. A second call does nothing."""
        if self._fd in _held:
            _held.discard(self._fd)
            os.close(self._fd)


def take_lock(descriptor: int, folder: Path) -> None:
    """Lock an open file of `folder` by flock until it is closed.

    A lock of POSIX is tried before: SQLite takes such ones, and reports their failure as a database
    in use. Raises GalleryLocked where another process has the lock, and StorageUnwritable where the
    file system gives none.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(descriptor, fcntl.LOCK_UN)  # NFS would take both kinds for rivals
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise GalleryLocked(
            f"the data folder {folder} is in use by another process; stop that one, "
            "or speak to it with --url"
        ) from error
    except OSError as error:
        reason = f"{errno.errorcode.get(error.errno or 0, '')}: {error.strerror}"
        if error.errno in _NO_LOCKS:
            raise StorageUnwritable(
                f"the file system of {folder} cannot lock files ({reason}); use a local disk, or "
                "mount it with locks (NFS: start its lock service, or mount with local_lock=all)"
            ) from error
        raise StorageUnwritable(
            f"the disk under {folder} reports an error when a file is locked ({reason}); check the "
            "disk and its mount"
        ) from error
