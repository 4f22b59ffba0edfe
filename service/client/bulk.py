"""What is enrolled in bulk: files in folders, and the entries of manifests."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model import image_files
from model.csv_table import read_table
from model.image_files import ImageFiles
from service.api.schemas import BatchItem, GalleryItem
from service.client.json_lines import is_json_lines, read_json_lines
from service.client.stream import Entry

COLUMNS = ("file", *BatchItem.model_fields)
"""Of a manifest: what the API takes with an image."""
EXPORTED = ("file", *(name for name in BatchItem.model_fields if name in GalleryItem.model_fields))
"""Those of them that an enrolled item still has."""
WHY = ("code", "reason")
"""What a report of failures adds to a manifest, and a manifest may hold for that."""


class EnrollmentError(Exception):
    """Nothing to enroll, or an unreadable manifest; the message says the remedy."""


class ManifestError(EnrollmentError):
    """All that is wrong with a manifest. problems: one sentence each, with their lines."""

    def __init__(self, manifest: Path, problems: Sequence[str]) -> None:
        super().__init__(f"{manifest}, of which nothing was sent: {'; '.join(problems)}")
        self.problems = problems


def find_images(paths: Iterable[Path]) -> ImageFiles:
    """The named files, whatever they are called, and the images in the named folders."""
    files: list[Path] = []
    folders: list[Path] = []
    for path in dict.fromkeys(paths):
        (folders if os.path.isdir(path) else files).append(path)  # noqa: PTH112 (never raises)
    found = image_files.find_images(folders)
    found.images = sorted({*files, *found.images})
    return found


def read_manifest(
    manifest: Path,
    paths: Iterable[Path],
    defaults: BatchItem | None = None,
    ignored: Collection[str] = (),
) -> list[Entry]:
    """Entries of a manifest, a CSV file or JSON Lines; its files are relative to it.

    paths: only files under these; none: all. defaults: of what a row leaves empty. ignored: columns
    to leave out of account.
    Raises ManifestError with all that is wrong, wherever the files lie.
    """
    # The header of a CSV file is read in lower case.
    known = dict.fromkeys((*COLUMNS, *ignored, *map(str.casefold, ignored), *WHY))
    try:
        if is_json_lines(manifest):
            table = read_json_lines(manifest, known)
        else:
            table = read_table(manifest, ("file",), known)
    except OSError as error:
        raise EnrollmentError(f"{manifest}: {error.strerror or error}") from error
    common = {} if defaults is None else defaults.model_dump(exclude_unset=True)
    roots = [path.resolve() for path in paths]
    problems, entries = table.problems, []
    lines: dict[tuple[Path, Any], int] = {}
    for line, row in table.rows:
        if not row["file"]:
            problems.append(f"line {line} names no file")
            continue
        cells = {name: row.get(name) for name in BatchItem.model_fields}
        try:
            given = {name: cell for name, cell in cells.items() if cell}
            item = BatchItem.model_validate(common | given)
        except ValidationError as error:
            problems += [f"line {line}: {problem}" for problem in what_is_wrong(error)]
            continue
        file = _named_file(manifest.parent, row["file"])
        place = file.resolve()
        first = lines.setdefault((place, item.box), line)
        if first != line:
            problems.append(f"line {line} names the file of line {first} again; keep one of them")
        if not roots or any(place.is_relative_to(root) for root in roots):
            entries.append(Entry(file, item))
    if problems:
        raise ManifestError(manifest, problems)
    return entries


def what_is_wrong(error: ValidationError) -> list[str]:
    """A sentence for each label that is none."""
    return [
        f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}"
        for one in error.errors()
    ]


def manifest_row(file: str, item: GalleryItem) -> list[str]:
    """An enrolled item as a line of a manifest with the columns `EXPORTED`."""
    values = item.model_dump(mode="json")
    row = [file]
    for name in EXPORTED[1:]:
        value = values[name]
        if isinstance(value, dict):
            row.append(json.dumps(value, ensure_ascii=False) if value else "")
        else:
            row.append("" if value is None else str(value))
    return row


def _named_file(folder: Path, name: str) -> Path:
    """The file that a manifest means: as written, else as Windows or macOS write its name."""
    for spelled in (name, name.replace("\\", "/")):
        for written in (spelled, *(unicodedata.normalize(f, spelled) for f in ("NFC", "NFD"))):
            if os.path.lexists(folder / written):
                return folder / written
    return folder / name
