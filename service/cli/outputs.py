"""Files that commands write: never the gallery's own, and none that is there without a question."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from model.terminal import printable
from service.auth.keys import KeyFile, KeyFileError
from service.gallery.backup.archive import START
from service.gallery.storage.folder_lock import LOCK_FILE
from service.gallery.storage.private_files import CONTENTS, OURS

Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there, unasked.")]

# First bytes of a database of SQLite, of its log (either byte order), and of the log's index.
_SQLITE = (b"SQLite format 3\0", b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83", b"\x18\xe2\x2d\0")


def output(path: Path, *, force: bool, special: bool = False) -> Path:
    """The file to write, links resolved; before the work, so that none is done in vain.

    Asks before a file is replaced, and refuses without a terminal to ask on. force: replace it.
    special: /dev/stdout, a pipe and the like may be written to.

    Raises typer.BadParameter, always for a file of a gallery, and typer.Abort for the answer no.
    """
    target = path.resolve()
    if special and target.exists() and not target.is_file() and not target.is_dir():
        return target
    if target.is_dir() or (target.exists() and not target.is_file()):
        raise typer.BadParameter(f"{path} is no regular file; give another name")
    _refuse_gallery(path, target)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(
            f"the folder of {path} is missing or cannot be written; make it, or give another"
        )
    if target.exists() and target.stat().st_size and not force:
        if not sys.stdin.isatty():
            raise typer.BadParameter(f"{path} exists; give another name, or --force to replace it")
        typer.confirm(printable(f"{path} exists. Replace it?"), abort=True, err=True)
    return target


def refuse_data_folder(folder: Path) -> None:
    """Raise typer.BadParameter for the data folder of a gallery, or a folder that is part of it."""
    place = folder.resolve()
    if _data_folder(place / "x") == place:
        raise typer.BadParameter(f"{folder} is the data folder of a gallery; give another folder")
    _refuse_gallery(folder, place)


def _refuse_gallery(path: Path, target: Path) -> None:
    home = _data_folder(target)
    is_part = home is not None and target.relative_to(home).parts[0].startswith(OURS)
    if is_part or (target.is_file() and _looks_like_one(target, inside=home is not None)):
        raise typer.BadParameter(
            f"{path} is, or may be, a file that a gallery or a service needs; give another name"
        )


def _data_folder(path: Path) -> Path | None:
    """The data folder that a path lies in."""
    for folder in path.parents:
        if (folder / LOCK_FILE).is_file() and any((folder / name).exists() for name in CONTENTS):
            return folder
    return None


def _looks_like_one(file: Path, *, inside: bool) -> bool:
    """Whether a file is a gallery's, or keys, under whatever name."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_SQLITE[0]))
        if start.startswith(_SQLITE):
            return True
        if inside or file.stat().st_nlink > 1:  # a hard link may lead to any file of a gallery
            return not start.startswith(START)
    except OSError:
        return True  # nobody who may not read it knows what it is
    try:
        KeyFile(file).read()
    except KeyFileError:
        return False
    return True
