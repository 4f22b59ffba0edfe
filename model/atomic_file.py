"""Atomic file replacement: a file is complete or absent, however its writer ends.

Here because checkpoints, training runs and the service all replace files; it imports no torch.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PRIVATE = 0o600
"""Mode of a file that only its owner may read."""
SHARED = 0o666
"""Mode of a file that everybody may read, as far as the umask of the process allows."""


@contextmanager
def whole_file(path: Path, mode: int = PRIVATE) -> Iterator[BinaryIO]:
    """Write to PATH.partial, which is synced and replaces `path` at the end.

    The file can be read as well, so that what was written is checked before it gets its name. One
    writer at a time: callers that may write to the same path must hold a lock. The partial file is
    removed where the context raises. Raises OSError, and FileExistsError where another writer has
    begun meanwhile.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(partial, flags, mode), "w+b") as file:
            try:
                if mode == PRIVATE:
                    with suppress(PermissionError):  # a file system without modes
                        os.fchmod(file.fileno(), mode)  # the umask may take from the owner, too
                yield file
                file.flush()
                os.fsync(file.fileno())
                if not _names(partial, file):
                    raise FileExistsError(
                        errno.EEXIST, "another process writes to it; try again", str(path)
                    )
                partial.replace(path)
            except BaseException:
                if _names(partial, file):
                    partial.unlink()
                raise
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:  # a failed write does not name the file
            error.filename = str(path)
        raise


def write_whole(path: Path, content: str | bytes, mode: int = SHARED) -> None:
    """Replace `path` by `content` (text in UTF-8), completely or not at all. Raises OSError.

    A path that is no regular file, such as /dev/stdout or a named pipe, is written to directly.
    """
    data = content.encode() if isinstance(content, str) else content
    target = path.resolve()  # the file that a symbolic link names is replaced, not the link
    if target.exists() and not target.is_file():
        with path.open("wb") as file:
            file.write(data)
        return
    with whole_file(target, mode) as file:
        file.write(data)


def _names(path: Path, file: BinaryIO) -> bool:
    """Whether `path` still names an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Make a file's new name durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
