"""`cmt enroll`: files and folders into the gallery of a running service."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.image_files import ImageFiles, Skipped
from model.terminal import Console, say
from service.api.schemas import BatchItem
from service.cli.options import (
    DEFAULT_URL,
    ApiKey,
    Client,
    ModalityOption,
    PolarityOption,
    Url,
    folder,
)
from service.client.bulk import (
    COLUMNS,
    EnrollmentError,
    Entry,
    Failure,
    ManifestError,
    find_images,
    read_manifest,
    send,
)

_SHOWN = 5  # names of what is left alone


def enroll(
    paths: Annotated[
        list[Path],
        # An empty one, as of an unset variable, would be the current folder.
        typer.Argument(metavar="PATH...", help="Files and folders.", parser=folder),
    ],
    manifest: Annotated[
        Path | None,
        typer.Option(
            help=f"CSV in UTF-8 with the column file and any of {', '.join(COLUMNS[1:])}. Its "
            "files are relative to it, and only those under PATH are enrolled."
        ),
    ] = None,
    ignore_column: Annotated[
        list[str] | None, typer.Option(help="Column of the manifest to leave out; repeat.")
    ] = None,
    person_id: Annotated[
        str | None, typer.Option(help="Label of all files; with a manifest, of those without.")
    ] = None,
    camera_id: Annotated[
        str | None, typer.Option(help="Camera of all files; with a manifest, of those without.")
    ] = None,
    modality: ModalityOption = None,
    polarity: PolarityOption = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Enroll image files, and all images in folders.

    May be interrupted and run again: a file that is enrolled already with the same labels is not
    enrolled twice. Files that fail are listed at the end, and the exit status is then 1. A manifest
    is checked as a whole before anything is sent.

    Example: cmt enroll crops/gate --camera-id gate
    """
    given = {
        "person_id": person_id,
        "camera_id": camera_id,
        "modality": modality,
        "polarity": polarity,
    }
    labels = BatchItem.model_validate({k: v for k, v in given.items() if v is not None})
    found = ImageFiles()
    if manifest is None:
        found = find_images(paths)
        entries = [Entry(file, labels) for file in found.images]
    else:
        entries = _listed(manifest, paths, labels, ignore_column or [])
    if not entries:
        report_skipped(found.skipped)
        raise EnrollmentError(
            f"no image under {', '.join(map(str, paths))}; JPEG, PNG, WebP, BMP and TIFF count"
        )
    console = Console()
    with Client(url, api_key=api_key) as client:
        client.ready()  # says at once that there is no service, not once per file
        failures = send_with_progress(client, entries, console)
    lost = [Failure(one.path, one.reason) for one in found.skipped if one.lost]
    report(len(entries) + len(lost), [*failures, *lost])
    report_skipped([one for one in found.skipped if not one.lost])
    if failures or lost:
        raise typer.Exit(1)


def _listed(
    manifest: Path, paths: Sequence[Path], labels: BatchItem, ignored: Sequence[str]
) -> list[Entry]:
    """The entries of a manifest; where several lines are wrong, all are printed."""
    try:
        return read_manifest(manifest, paths, labels, ignored)
    except ManifestError as error:
        if len(error.problems) == 1:
            raise
        for problem in error.problems:
            say(f"{manifest}: {problem}", err=True)
        raise EnrollmentError(
            f"{len(error.problems)} problems in {manifest}; nothing was sent, correct them first"
        ) from error


def send_with_progress(client: Client, entries: list[Entry], console: Console) -> list[Failure]:
    """Enroll `entries` under a progress bar → the files that failed."""
    bar = Progress(
        TextColumn("Enrolling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("", total=len(entries))
        return send(client, entries, lambda count: bar.advance(task, count))


def report(files: int, failures: Sequence[Failure]) -> None:
    """Print how many files are enrolled, and why each of the others failed."""
    say(f"{files - len(failures)} of {files} files are enrolled.")
    for failure in failures:
        say(f"{failure.file}: {failure.reason}")


def report_skipped(skipped: Sequence[Skipped]) -> None:
    """Print what was passed over: each that may have held an image, the rest in one line."""
    for one in skipped:
        if one.lost:
            say(f"{one.path}: {one.reason}")
    left = [one for one in skipped if not one.lost]
    if left:
        names = ", ".join(str(one.path) for one in left[:_SHOWN])
        more = ", …" if len(left) > _SHOWN else ""
        say(f"Left alone, of other programs or read already: {len(left)} ({names}{more}).")
