"""Whether a file that this process has open is still the one that its path names.

What is written to a file that was removed, or moved with its folder, is not there after a restart.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from service.errors import StorageMoved


class OpenFile:
    """A file as it was when it was opened: its device and inode, which no other file can have.

    Keep it open meanwhile, otherwise its inode may be given to another file. what: its name in a
    sentence. path: gives the path by which a restart would open it. Raises StorageMoved.
    """

    def __init__(self, what: str, path: Callable[[], str]) -> None:
        self._what, self._path = what, path
        self._identity = self._found()

    def check(self) -> None:
        """Raise StorageMoved unless the path still names the same file."""
        if self._found() != self._identity:
            raise self._moved("another one is in its place")

    def _found(self) -> tuple[int, int]:
        try:
            status = os.stat(self._path())  # noqa: PTH116 - the path is text, this runs often
        except OSError as error:
            gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
            raise self._moved("it was moved or removed" if gone else str(error.strerror)) from error
        return status.st_dev, status.st_ino

    def _moved(self, reason: str) -> StorageMoved:
        return StorageMoved(
            f"{self._what} is no longer the one that the service has open: {reason}; nothing is "
            "stored until it is back in its place, or until a restart, which opens what is there"
        )
