"""Which files of a folder are images to use, and which are passed over: one rule for everybody.

An image is a regular file whose name ends like one. What other programs leave beside pictures
(thumbnails, AppleDouble files, recycle bins, all that begins with a dot) is nobody's picture. A
folder is entered whatever it is called and by whatever link, once. Pipes, sockets and devices are
never opened: a pipe waits for its other end for ever.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# Folders that network storage, operating systems and archives make; all else that they make begins
# with a dot or does not end like an image.
_OTHER_PROGRAMS = frozenset(
    {
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "@__thumb",
        "@eadir",
        "@recently-snapshot",
        "@recycle",
        "@tmp",
        "__macosx",
        "lost+found",
        "recycler",
        "system volume information",
    }
)
_KINDS = (
    (stat.S_ISDIR, "is a folder, not a file"),
    (stat.S_ISFIFO, "is a pipe, not a file"),
    (stat.S_ISSOCK, "is a socket, not a file"),
    (stat.S_ISCHR, "is a device, not a file"),
    (stat.S_ISBLK, "is a device, not a file"),
)


@dataclass(frozen=True)
class Skipped:
    """What was passed over, and why. lost: whether an image may be missing by that."""

    path: Path
    reason: str
    lost: bool = True


@dataclass
class ImageFiles:
    """The images of a folder and what was passed over, both sorted by path.

    Files that are not named like an image (a list, a text) are in neither.
    """

    images: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def is_other_programs(name: str) -> bool:
    """Whether a file or folder of this name belongs to another program than the user's."""
    return name.startswith(".") or name.casefold() in _OTHER_PROGRAMS


def has_image_name(path: Path) -> bool:
    """Whether a file's name ends like that of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def find_images(folders: Path | Iterable[Path], *, below: bool = True) -> ImageFiles:
    """The images in folders. below: also those in the folders inside, to any depth.

    A folder that several names or links lead to is read once, by its own name where it has one
    here. One that cannot be read is among what is skipped, and so is a `folders` that is none.
    """
    found = ImageFiles()
    read: set[tuple[int, int]] = set()
    waiting = [folders] if isinstance(folders, Path) else list(folders)
    links: deque[Path] = deque()  # after all else, so that a folder is found by its own name
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in read:
                found.skipped.append(Skipped(folder, "leads to a folder read already", lost=False))
                continue
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            found.skipped.append(Skipped(folder, _reason(error)))
            continue
        read.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = folder / entry.name
            image_name = has_image_name(path)
            if is_other_programs(entry.name):
                if image_name or _is_folder(entry):
                    found.skipped.append(Skipped(path, "made by another program", lost=False))
            elif _is_folder(entry):
                if below:
                    (links if entry.is_symlink() else waiting).append(path)
                elif image_name:
                    found.skipped.append(Skipped(path, "is a folder, not a file"))
            elif image_name:
                reason = None if _is_plain_file(entry) else why_unusable(path)
                if reason is None:
                    found.images.append(path)
                else:
                    found.skipped.append(Skipped(path, reason))
            elif below and entry.is_symlink() and not os.path.exists(path):  # noqa: PTH110 (never raises)
                # Perhaps a folder full of images, on a disk that is not there.
                found.skipped.append(Skipped(path, "is a link to nothing"))
    found.images.sort()
    found.skipped.sort(key=lambda one: one.path)
    return found


def why_unusable(path: Path) -> str | None:
    """Why nothing can be read from a file that somebody named; None where it is a regular file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "is a link to nothing" if path.is_symlink() else _reason(error)
    return next((reason for is_kind, reason in _KINDS if is_kind(mode)), None)


def read_file(path: Path) -> bytes:
    """The content of a regular file. Raises OSError, for what is none too, without waiting."""
    reason = why_unusable(path)
    if reason is not None:
        raise OSError(errno.EINVAL, reason, str(path))
    return path.read_bytes()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that nobody may follow
        return False


def _is_plain_file(entry: os.DirEntry[str]) -> bool:
    """By the listing alone: asking for every file takes minutes on a network."""
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
