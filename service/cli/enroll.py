"""`cmt enroll`: files and folders into the gallery of a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from service.cli.options import DEFAULT_URL, ApiKey, Client, ModalityOption, Url
from service.client.bulk import EnrollmentError, Entry, Failure, find_images, read_manifest, send


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
        failures = send_with_progress(client, entries, console)
    report(console, len(entries), failures)
    if failures:
        raise typer.Exit(1)


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


def report(console: Console, files: int, failures: list[Failure]) -> None:
    """Print how many files are enrolled, and why each of the others failed."""
    console.print(f"{files - len(failures)} of {files} files are enrolled.")
    for failure in failures:
        console.print(f"{failure.file}: {failure.reason}", markup=False, soft_wrap=True)
