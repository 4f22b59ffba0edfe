"""`cmt data`: look at a dataset before training on it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from model.terminal import Console
from training.datasets import LAYOUTS, DatasetName, find_layout
from training.datasets.check import DatasetCheck, check_dataset
from training.files import write_report
from training.options import FiguresFile, Trial

SHOWN_IDENTITIES = 10  # identities of a list; --json has all

app = typer.Typer(
    no_args_is_help=True,
    help="Look at a dataset's folder.\n\nExample: cmt data check SYSU-MM01",
)


@app.callback()
def _group() -> None:
    """Keeps `check` a subcommand although it is the only one."""


@app.command()
def check(
    root: Annotated[Path, typer.Argument(help="Folder of the dataset.")],
    dataset: Annotated[
        DatasetName | None,
        typer.Option(help="Layout of ROOT. Default: the one whose folders it has."),
    ] = None,
    trial: Trial = 1,
    json_file: FiguresFile = None,
) -> None:
    """Count identities, cameras, images and unreadable files, beside the set's published counts.

    Exit status 1 if a file is unreadable or cannot be used.

    Example: cmt data check SYSU-MM01
    """
    layout = find_layout(root) if dataset is None else LAYOUTS[dataset]
    console = Console(soft_wrap=True)

    def progress(files: Iterator[str | None], number: int) -> Iterator[str | None]:
        return iter(
            track(
                files,
                "Decoding the images",
                number,
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
        )

    found = check_dataset(layout, root, trial, progress=progress)
    console.print(_counts(found, layout.title, layout.published))
    console.print(_cameras(found))
    for note in found.notes:
        console.print(f"Note: {note}")
    if found.one_modality:
        console.print(
            f"Identities with one modality only, which cannot be trained on: "
            f"{len(found.one_modality)}",
        )
        for person, folder in list(found.one_modality.items())[:SHOWN_IDENTITIES]:
            console.print(f"  {person}: only {folder}")
        if len(found.one_modality) > SHOWN_IDENTITIES:
            console.print("  …")
    for folder in found.empty:
        console.print(f"Empty: {folder}")
    for path, reason in found.unreadable:
        console.print(f"Unreadable: {path}: {reason}")
    lost = [one for one in found.skipped if one.lost]
    for one in lost:
        console.print(f"Not used: {one.path}: {one.reason}")
    left = [one.path for one in found.skipped if not one.lost]
    if left:
        console.print(
            f"Left alone, of other programs or read already: {len(left)}, the first is {left[0]}"
        )
    console.print(f"{len(found.unreadable)} of {found.counts['images']} files are unreadable.")
    if json_file is not None:
        content = {"dataset": layout.name.value, "published": layout.published} | asdict(found)
        write_report(json_file, content)
    if found.unreadable or lost:
        raise typer.Exit(1)


def _counts(found: DatasetCheck, title: str, published: dict[str, int]) -> Table:
    table = Table(title=f"{title}: counts")
    table.add_column("")
    table.add_column("found", justify="right")
    if not published:  # anyone's own images
        for name, count in found.counts.items():
            table.add_row(name, str(count))
        return table
    table.add_column("published", justify="right")
    table.add_column("")
    for name, count in found.counts.items():
        expected = published.get(name)
        verdict = "" if expected is None else "as published" if count == expected else "differs"
        table.add_row(name, str(count), "" if expected is None else str(expected), verdict)
    for name, expected in published.items():
        if name not in found.counts:
            table.add_row(name, "", str(expected), "not found")
    return table


def _cameras(found: DatasetCheck) -> Table:
    table = Table(title="by camera")
    table.add_column("modality")
    for name in ("camera", "identities", "images"):
        table.add_column(name, justify="right")
    for row in found.cameras:
        table.add_row(row.modality, str(row.camera), str(row.identities), str(row.images))
    return table
