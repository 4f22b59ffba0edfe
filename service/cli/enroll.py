"""`cmt enroll`: files and folders into the gallery of a running service."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from service.cli.options import DEFAULT_URL, ApiKey, Client, ModalityOption, Url
from service.client import ServiceProblem

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
_SENDERS = 4  # uploads on their way while the service embeds another


class EnrollmentError(Exception):
    """What to enroll cannot be read; the message says the remedy."""


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


def enroll(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files and folders.")],
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns file, person_id, camera_id, modality; its files are "
            "relative to it, and only those under PATH are enrolled."
        ),
    ] = None,
    person_id: Annotated[str | None, typer.Option(help="Label of all the files.")] = None,
    camera_id: Annotated[str | None, typer.Option(help="Camera of all the files.")] = None,
    modality: ModalityOption = "auto",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Enroll image files, and all images in folders.

    May be interrupted and run again: a file that is enrolled already with the same labels is not
    enrolled twice. Files that fail are listed at the end, and the exit status is then 1.

    Example: cmt enroll crops/gate --camera-id gate
    """
    if manifest is None:
        entries = [Entry(file, person_id, camera_id, modality) for file in find_images(paths)]
    else:
        entries = read_manifest(manifest, paths)
    if not entries:
        raise EnrollmentError(
            f"no image under {', '.join(map(str, paths))}; JPEG, PNG, WebP, BMP and TIFF count"
        )
    console = Console()
    with Client(url, api_key=api_key) as client:
        client.ready()  # says at once that there is no service, not once per file
        failures = send(client, entries, console)
    report(console, len(entries), failures)
    if failures:
        raise typer.Exit(1)


def send(client: Client, entries: list[Entry], console: Console) -> list[Failure]:
    """Enroll `entries` with a progress bar → what failed. Ctrl-C leaves what is sent enrolled."""
    bar = Progress(
        TextColumn("Enrolling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    failures: list[Failure] = []
    pool = ThreadPoolExecutor(_SENDERS)
    try:
        with bar:
            work: dict[Future[str | None], Entry] = {
                pool.submit(_send_one, client, entry): entry for entry in entries
            }
            for done in bar.track(as_completed(work), total=len(work)):
                reason = done.result()
                if reason is not None:
                    failures.append(Failure(work[done].file, reason))
    finally:
        pool.shutdown(cancel_futures=True)
    return sorted(failures, key=lambda failure: failure.file)


def report(console: Console, files: int, failures: list[Failure]) -> None:
    """What happened, and why to each file that failed."""
    console.print(f"{files - len(failures)} of {files} files are enrolled.")
    for failure in failures:
        console.print(f"{failure.file}: {failure.reason}", markup=False, soft_wrap=True)


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


def _send_one(client: Client, entry: Entry) -> str | None:
    """Enroll one file → why not, if it failed. Raises Unreachable: then all the others fail too."""
    try:
        data = entry.file.read_bytes()
    except OSError as error:
        return error.strerror or str(error)
    try:
        client.enroll(
            data,
            person_id=entry.person_id,
            camera_id=entry.camera_id,
            modality=entry.modality,
            idempotency_key=_key(entry, data),
        )
    except ServiceProblem as problem:
        if problem.status in (401, 403):
            raise
        return str(problem)
    return None


def _key(entry: Entry, data: bytes) -> str:
    """The same file with the same labels has the same key, in this run and in every other."""
    labels = json.dumps(
        [str(entry.file.resolve()), entry.person_id, entry.camera_id, entry.modality]
    )
    return (
        "cmt-enroll-" + hashlib.sha256(hashlib.sha256(data).digest() + labels.encode()).hexdigest()
    )
