"""Files that a command leaves behind: checked before the work, and never a reason to lose it.

A path that cannot be written is refused before anything is computed; what fails at the end, as on a
full disk, is said after the figures were printed and the other files written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


class OutputError(ValueError):
    """A file or folder that a command cannot write; the message says why and what to do."""


def check_file(path: Path) -> None:
    """Raises OutputError unless a file can be written there, in folders that may not exist yet.

    A pipe or device, such as /dev/stdout, is left to the writer.
    """
    with _refusing(path):
        target = path.resolve()
        if target.is_dir():
            raise OutputError(f"{path} is a folder; give the name of a file")
        if target.exists() and not target.is_file():
            return
        target.with_name(f"{target.name}.partial").exists()  # as it is called while it is written
        _check_folder(target.parent)


def check_folder(path: Path) -> None:
    """Raises OutputError unless files can be written into that folder, which may not exist yet."""
    with _refusing(path):
        _check_folder(path.resolve())


class Outputs:
    """What a command writes after it has printed what it found."""

    def __init__(self) -> None:
        self._failures: list[str] = []

    @contextmanager
    def attempt(self, path: Path) -> Iterator[None]:
        """Go on where the block cannot write `path`, or files below it; `finish` says so."""
        try:
            yield
        except OSError as error:
            self._failures.append(f"{error.filename or path}: {error.strerror or error}")

    def finish(self) -> None:
        """Raises OutputError where something was not written."""
        if self._failures:
            raise OutputError(
                f"not written: {'; '.join(self._failures)}; what was found is printed above"
            )


def file_option(path: Path | None) -> Path | None:
    """Callback of an option that names a file to write; refused as wrong usage."""
    return _checked(path, check_file)


def folder_option(path: Path | None) -> Path | None:
    """Callback of an option that names a folder to write files into."""
    return _checked(path, check_folder)


def picture_option(path: Path | None) -> Path | None:
    """Callback of an option that names a picture to write."""
    if path is not None and path.suffix not in PICTURE_SUFFIXES:
        raise typer.BadParameter(f"{path} ends in none of {', '.join(PICTURE_SUFFIXES)}")
    return file_option(path)


ResultsFile = Annotated[
    Path | None, typer.Option("--json", help="Write the results here.", callback=file_option)
]


def _checked(path: Path | None, check: Callable[[Path], None]) -> Path | None:
    if path is not None:
        try:
            check(path)
        except OutputError as error:
            raise typer.BadParameter(str(error)) from error
    return path


def _check_folder(folder: Path) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise OutputError(f"{there} is a file, and would have to be a folder; give another path")
    with tempfile.TemporaryFile(dir=there):  # permissions alone do not say it
        pass


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name with NUL
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(
            f"{path} cannot be written ({reason}); give another path, or make room for it"
        ) from error
