"""Which files a command takes, with their labels: those under folders, or those of a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.image_files import Skipped
from model.terminal import Console, say
from service.cli.failures import LABELS, UNREADABLE, Failure
from service.cli.naming import LabelsInvalid, Naming, below
from service.client import Entry
from service.client.bulk import (
    COLUMNS,
    EnrollmentError,
    ManifestError,
    find_images,
    read_manifest,
)
from service.kit.text import counted

_SHOWN = 5  # names of what is left alone
_FAILURES = 20  # that are printed

ManifestOption = Annotated[
    Path | None,
    typer.Option(
        help=f"CSV in UTF-8, or JSON Lines, with the column file and any of "
        f"{', '.join(COLUMNS[1:])}. Its files are relative to it, and only those under PATH "
        "are taken."
    ),
]
IgnoreColumn = Annotated[
    list[str] | None, typer.Option(help="Column of the manifest to leave out; repeat.")
]
PersonId = Annotated[str | None, typer.Option(help="Label of all files that nothing else labels.")]
CameraId = Annotated[
    str | None, typer.Option(help="Camera of all files that nothing else says one of.")
]
Report = Annotated[
    Path | None,
    typer.Option(
        help="Write what failed to this file, as CSV or (.jsonl) JSON Lines; give it back as "
        "--manifest to try again."
    ),
]


@dataclass
class Plan:
    """What is to be taken, what cannot be, and what is left alone."""

    entries: list[Entry] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left: list[Skipped] = field(default_factory=list)
    unmatched: list[Path] = field(default_factory=list)


def planned(
    paths: Sequence[Path], manifest: Path | None, labels: Naming, ignored: Sequence[str]
) -> Plan:
    """The files of a manifest, or those under paths. Raises EnrollmentError for none."""
    if manifest is not None:
        return Plan(_listed(manifest, paths, labels, ignored))
    if paths:
        return _found(paths, labels)
    raise typer.BadParameter("name the files or folders to take, or give a --manifest")


def _found(paths: Sequence[Path], labels: Naming) -> Plan:
    """The images under paths, with the labels that their own paths say."""
    found = find_images(paths)
    folders = [path for path in paths if path.is_dir()]
    plan = Plan()
    for one in found.skipped:
        if one.lost:
            plan.failures.append(Failure(one.path, UNREADABLE, one.reason))
        else:
            plan.left.append(one)
    for file in found.images:
        place = below(file, folders)
        if labels.pattern is not None and place is None:
            raise typer.BadParameter(
                f"--pattern says labels of files below a folder, and {file} is none; name the "
                "folder to walk"
            )
        try:
            entry = labels.entry(file, "" if place is None else place[1])
        except OSError as error:
            reason = error.strerror or str(error)
            plan.failures.append(Failure(file, UNREADABLE, reason))
        except LabelsInvalid as error:
            plan.failures.append(Failure(file, LABELS, str(error), error.labels))
        else:
            if entry is None:
                plan.unmatched.append(file)
            else:
                plan.entries.append(entry)
    if plan.entries or plan.failures:
        return plan
    where = ", ".join(map(str, paths))
    if plan.unmatched and labels.pattern is not None:
        example = plan.unmatched[0]
        place = below(example, folders)
        why = "" if place is None else f": {labels.pattern.why_not(place[1])}"
        raise EnrollmentError(
            f"none of {counted(len(plan.unmatched), 'image')} under {where} matches the pattern "
            f"{labels.pattern.text!r}; for example {example} does not{why}"
        )
    print_left(plan)
    raise EnrollmentError(f"no image under {where}; JPEG, PNG, WebP, BMP and TIFF count")


def _listed(
    manifest: Path, paths: Sequence[Path], labels: Naming, ignored: Sequence[str]
) -> list[Entry]:
    """The entries of a manifest; where several lines are wrong, all are printed."""
    try:
        entries = read_manifest(manifest, paths, labels.defaults, ignored)
    except ManifestError as error:
        if len(error.problems) == 1:
            raise
        for problem in error.problems:
            say(f"{manifest}: {problem}", err=True)
        raise EnrollmentError(
            f"{len(error.problems)} problems in {manifest}; nothing was sent, correct them first"
        ) from error
    if not entries:
        where = f" that is under {', '.join(map(str, paths))}" if paths else ""
        raise EnrollmentError(f"{manifest} names no file{where}; there is nothing to enroll")
    return entries


def print_left(plan: Plan) -> None:
    """Print what was passed over: how many, and the names of the first."""
    if plan.unmatched:
        say(f"Left out by the pattern: {_named(plan.unmatched)}.")
    if plan.left:
        paths = [one.path for one in plan.left]
        say(f"Left alone, of other programs or read already: {_named(paths)}.")


def _named(paths: Sequence[Path]) -> str:
    more = ", …" if len(paths) > _SHOWN else ""
    return f"{len(paths)} ({', '.join(map(str, paths[:_SHOWN]))}{more})"


def print_failures(failures: Sequence[Failure], report: Path | None) -> None:
    """Print why the first of them failed. report: where all of them are."""
    for failure in failures[:_FAILURES]:
        say(f"{failure.file}: {failure.reason}")
    if len(failures) > _FAILURES:
        where = "--report FILE names all" if report is None else f"all are in {report}"
        say(f"{len(failures) - _FAILURES} more failed; {where}.")


def progress_bar(doing: str) -> Progress:
    """A bar on standard error. Where nobody looks, it would be a line in a log: then none."""
    console = Console(stderr=True)
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
