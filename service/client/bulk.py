"""Enroll many files: folders and manifests, in requests of many images each."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model import image_files
from model.csv_table import read_table
from model.image_files import ImageFiles, read_file
from service.api.schemas import BatchItem, GalleryItem
from service.client.client import Client
from service.client.requests import ServiceProblem

COLUMNS = ("file", *BatchItem.model_fields)
"""Of a manifest: what the API takes with an image."""
EXPORTED = ("file", *(name for name in BatchItem.model_fields if name in GalleryItem.model_fields))
"""Those of them that an enrolled item still has."""
_SENDERS = 2  # one request is sent while the service embeds the other's images
_BATCH = 64  # files of one request
_BATCH_BYTES = 64_000_000


class EnrollmentError(Exception):
    """Nothing to enroll, or an unreadable manifest; the message says the remedy."""


class ManifestError(EnrollmentError):
    """All that is wrong with a manifest. problems: one sentence each, with their lines."""

    def __init__(self, manifest: Path, problems: Sequence[str]) -> None:
        super().__init__(f"{manifest}, of which nothing was sent: {'; '.join(problems)}")
        self.problems = problems


@dataclass(frozen=True)
class Entry:
    """One file with its labels."""

    file: Path
    item: BatchItem = field(default_factory=BatchItem)


@dataclass(frozen=True)
class Failure:
    """A file that was not enrolled, and the sentence that says why."""

    file: Path
    reason: str


def send(
    client: Client,
    entries: Sequence[Entry],
    progress: Callable[[int], None] = lambda count: None,
) -> list[Failure]:
    """Enroll `entries` in requests of many each → what failed, by file.

    progress: called with how many more are done. After Ctrl-C, what was sent stays enrolled.
    Raises Unreachable, and ServiceProblem for a key that may not enroll.
    """
    failures: list[Failure] = []
    pool = ThreadPoolExecutor(_SENDERS)
    try:
        work = [pool.submit(_send_some, client, some) for some in _batches(entries)]
        for done in as_completed(work):
            sent, failed = done.result()
            failures += failed
            progress(sent)
    finally:
        pool.shutdown(cancel_futures=True)
    return sorted(failures, key=lambda failure: failure.file)


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
    """Entries of a manifest whose files lie under `paths`; files are relative to the manifest.

    defaults: of what a row leaves empty. ignored: columns to leave out of account.
    Raises ManifestError with all that is wrong, wherever the files lie.
    """
    try:
        table = read_table(
            manifest, ("file",), {**dict.fromkeys(COLUMNS), **dict.fromkeys(ignored)}
        )
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
            problems += [
                f"line {line}: {'.'.join(map(str, one['loc']))}: "
                f"{one['msg'].removeprefix('Value error, ')}"
                for one in error.errors()
            ]
            continue
        file = _named_file(manifest.parent, row["file"])
        place = file.resolve()
        first = lines.setdefault((place, item.box), line)
        if first != line:
            problems.append(f"line {line} names the file of line {first} again; keep one of them")
        if any(place.is_relative_to(root) for root in roots):
            entries.append(Entry(file, item))
    if problems:
        raise ManifestError(manifest, problems)
    return entries


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


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries that go into one request: few enough, and not too large together."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        try:
            more = entry.file.stat().st_size
        except OSError:  # reported when it is read
            more = 0
        if batch and (len(batch) == _BATCH or size + more > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += more
    if batch:
        yield batch


def _send_some(client: Client, entries: Sequence[Entry]) -> tuple[int, list[Failure]]:
    """Enroll files in one request → how many there were, and those that failed.

    Raises Unreachable, and ServiceProblem for a key that may not enroll: then all others fail too.
    """
    failures: list[Failure] = []
    images: list[bytes] = []
    sent: list[Entry] = []
    for entry in entries:
        try:
            images.append(read_file(entry.file))
            sent.append(entry)
        except OSError as error:
            failures.append(Failure(entry.file, error.strerror or str(error)))
    if not sent:
        return len(entries), failures
    items = [_with_key(entry, data) for entry, data in zip(sent, images, strict=True)]
    try:
        results = client.enroll_batch(images, items)
    except ServiceProblem as problem:
        if problem.status in (401, 403):
            raise
        if len(sent) == 1:
            return len(entries), [*failures, Failure(sent[0].file, str(problem))]
        # Refused as a whole, for its size for example: what can be enrolled alone is.
        return len(entries), failures + _sent_alone(client, sent)
    again: list[Entry] = []
    for entry, result in zip(sent, results, strict=True):
        refused = result.problem
        if refused is None:
            continue
        # Not the image's fault, but of the moment, or of the company it came in.
        if len(sent) > 1 and (refused.status == 503 or refused.code == "decode_budget_spent"):
            again.append(entry)
        else:
            failures.append(Failure(entry.file, refused.detail))
    return len(entries), failures + _sent_alone(client, again)


def _sent_alone(client: Client, entries: Sequence[Entry]) -> list[Failure]:
    return [failure for entry in entries for failure in _send_some(client, [entry])[1]]


def _with_key(entry: Entry, data: bytes) -> BatchItem:
    """The entry's labels with its own key, or one for this file with these labels.

    The same in every run, so that a repeat enrolls nothing twice.
    """
    if entry.item.key is not None:
        return entry.item
    given = {k: v for k, v in entry.item.model_dump(mode="json").items() if v not in (None, {})}
    known: list[Any] = [str(entry.file.resolve())]
    known += [given.pop("person_id", None), given.pop("camera_id", None)]
    known.append(given.pop("modality", "auto"))
    if given:
        known.append(given)
    content = hashlib.sha256(data).digest() + json.dumps(known, sort_keys=True).encode()
    return entry.item.model_copy(
        update={"key": f"cmt-enroll-{hashlib.sha256(content).hexdigest()}"}
    )
