"""The data folder is its owner's alone: folders 0700 and files 0600, whatever the umask.

Crops of people are in it. SQLite gives its log the mode of the database file, so what matters is
the mode that a file is made with.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from service.kit.text import counted

log = logging.getLogger(__name__)

FOLDER, FILE = 0o700, 0o600
_OTHERS = 0o077
# One of them is in every data folder, beside the lock.
CONTENTS = ("gallery.sqlite3", "audit.key", "index", "cache")
# What the gallery and the service put into it, by the start of the first name; SQLite's other files
# begin as the database does.
OURS = (*CONTENTS, "lock", ".audit.key", ".cmt-copy-")


def private_folder(folder: Path) -> None:
    """Make a folder, private, unless it is there. Raises OSError."""
    try:
        folder.mkdir(FOLDER, parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        with suppress(PermissionError):
            folder.chmod(FOLDER)  # the umask may have taken the owner's bits too


def private_file(path: str) -> None:
    """Make an empty file, private, unless it is there. Raises OSError.

    One that is there is not opened: closing it would release the locks that SQLite has on it.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE)
    except FileExistsError:
        return
    try:
        with suppress(PermissionError):  # a file system without modes: `tighten` tells
            os.fchmod(descriptor, FILE)
    finally:
        os.close(descriptor)


def tighten(folder: Path) -> None:
    """Take from others what they may do in a data folder; the log tells what was changed.

    Files that are not the gallery's lose the same bits and keep their contents and their owner's.
    Symbolic links and other file systems are not followed. Where a mode cannot be changed, that is
    a warning: mounted volumes often belong to somebody else, or have no modes. A folder that
    everybody shares by design, such as /tmp, stays as it is.
    """
    if folder.stat().st_mode & stat.S_ISVTX or folder.resolve().parent == folder.resolve():
        log.warning("%s is everybody's; give the gallery a data folder of its own", folder)
        return
    changed, refused, why = 0, list[Path](), ""
    for path, status in _entries(folder):
        wanted = _wanted(folder, path, status)
        if stat.S_IMODE(status.st_mode) == wanted:
            continue
        reason = _changed(path, wanted)
        if reason is None:
            changed += 1
        elif status.st_mode & _OTHERS:
            refused.append(path)
            why = why or reason
    if changed:
        log.warning(
            "%s of the data folder %s, open to others or not to their owner until now: "
            "now only their owner may use them",
            *(counted(changed, "file or folder", "files or folders"), folder),
        )
    if refused:
        log.warning("%s", told(folder, refused, why))


def open_to_others(folder: Path) -> list[Path]:
    """What others than its owner may use in a data folder. Changes nothing."""
    return [path for path, status in _entries(folder) if status.st_mode & _OTHERS]


def told(folder: Path, found: list[Path], reason: str) -> str:
    """A sentence about what others may use. reason: why that is so for the first."""
    return (
        f"others may use {counted(len(found), 'file or folder', 'files or folders')} of the data "
        f"folder {folder}, such as {found[0]} ({reason}); it holds personal data: mount it so that "
        "only the service's user can enter it"
    )


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The folder and what is in it, files and folders only, with their status."""
    top = folder.stat()
    yield folder, top
    waiting = [folder]
    while waiting:
        try:
            inside = list(os.scandir(waiting.pop()))
        except OSError:  # somebody else's, such as lost+found
            continue
        for entry in inside:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:  # gone meanwhile
                continue
            if status.st_dev != top.st_dev:
                continue
            if stat.S_ISDIR(status.st_mode):
                waiting.append(Path(entry.path))
            if stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode):
                yield Path(entry.path), status


def _wanted(folder: Path, path: Path, status: os.stat_result) -> int:
    if stat.S_ISDIR(status.st_mode):
        return FOLDER
    ours = path.relative_to(folder).parts[0].startswith(OURS)
    return FILE if ours else FILE | status.st_mode & stat.S_IXUSR  # a program stays one


def _changed(path: Path, mode: int) -> str | None:
    """Change a mode → None, or why it stays."""
    try:
        path.chmod(mode)
        if stat.S_IMODE(path.stat().st_mode) & _OTHERS:
            return "its file system keeps no modes"
    except OSError as error:
        return str(error.strerror)
    return None
