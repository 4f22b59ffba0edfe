"""Enroll many files: folders and manifests, in requests of many images each."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.api.schemas import BatchItem
from service.client.client import Client
from service.client.requests import ServiceProblem

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
_SENDERS = 2  # one request is sent while the service embeds the other's images
_BATCH = 64  # files of one request
_BATCH_BYTES = 64_000_000


class EnrollmentError(Exception):
    """Nothing to enroll, or an unreadable manifest; the message says the remedy."""


@dataclass(frozen=True)
class Entry:
    """One file with its labels."""

    file: Path
    person_id: str | None = None
    camera_id: str | None = None
    modality: Literal["auto", "rgb", "ir"] = "auto"


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


def find_images(paths: Iterable[Path]) -> Iterator[Path]:
    """The named files, whatever they are called, and the images in the named folders, sorted."""
    for path in paths:
        if path.is_dir():
            inside = path.rglob("*")
            yield from sorted(p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            yield path


def read_manifest(manifest: Path, paths: Iterable[Path]) -> list[Entry]:
    """Entries of a manifest whose files lie under `paths`. Raises EnrollmentError."""
    roots = [path.resolve() for path in paths]
    entries = []
    try:
        with manifest.open(newline="") as file:
            for row in csv.DictReader(file):
                image = manifest.parent / row["file"]
                if any(image.resolve().is_relative_to(root) for root in roots):
                    entries.append(
                        Entry(
                            image,
                            row.get("person_id") or None,
                            row.get("camera_id") or None,
                            _modality(row.get("modality")),
                        )
                    )
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise EnrollmentError(
            f"{manifest} is no manifest ({error}); it needs the columns file, person_id, "
            "camera_id, modality"
        ) from error
    return entries


def _modality(text: str | None) -> Literal["auto", "rgb", "ir"]:
    match text or "auto":
        case "auto" | "rgb" | "ir" as known:
            return known
        case other:
            raise ValueError(f"modality {other!r} is not auto, rgb or ir")


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
            images.append(entry.file.read_bytes())
            sent.append(entry)
        except OSError as error:
            failures.append(Failure(entry.file, error.strerror or str(error)))
    if not sent:
        return len(entries), failures
    items = [_item(entry, data) for entry, data in zip(sent, images, strict=True)]
    try:
        results = client.enroll_batch(images, items)
    except ServiceProblem as problem:
        if problem.status in (401, 403):
            raise
        if len(sent) == 1:
            return len(entries), [*failures, Failure(sent[0].file, str(problem))]
        # Refused as a whole, for its size for example: what can be enrolled alone is.
        alone = [_send_some(client, [entry]) for entry in sent]
        return len(entries), failures + [failure for _, some in alone for failure in some]
    failures += [
        Failure(entry.file, result.problem.detail)
        for entry, result in zip(sent, results, strict=True)
        if result.problem is not None
    ]
    return len(entries), failures


def _item(entry: Entry, data: bytes) -> BatchItem:
    item = BatchItem(modality=entry.modality, key=_key(entry, data))
    if entry.person_id is not None:
        item.person_id = entry.person_id
    if entry.camera_id is not None:
        item.camera_id = entry.camera_id
    return item


def _key(entry: Entry, data: bytes) -> str:
    """The same file with the same labels has the same key, in this run and in every other."""
    labels = json.dumps(
        [str(entry.file.resolve()), entry.person_id, entry.camera_id, entry.modality]
    )
    return (
        "cmt-enroll-" + hashlib.sha256(hashlib.sha256(data).digest() + labels.encode()).hexdigest()
    )
