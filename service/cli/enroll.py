"""`cmt enroll`: files and folders into the gallery of a running service."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.image_files import Skipped
from model.terminal import Console, say
from service.cli.failures import LABELS, UNREADABLE, Failure, failure_of, is_report, write_report
from service.cli.interrupts import INTERRUPTED, Stopping, stopping
from service.cli.naming import (
    FileTime,
    LabelsInvalid,
    Naming,
    PatternOption,
    TimezoneOption,
    below,
    naming,
)
from service.cli.options import (
    DEFAULT_URL,
    ApiKey,
    Client,
    ModalityOption,
    PolarityOption,
    Urls,
    folder,
)
from service.cli.outputs import Force, output
from service.client import Entry, EntryResult, OtherGallery, ServiceProblem, Unreachable
from service.client.bulk import (
    COLUMNS,
    EnrollmentError,
    ManifestError,
    find_images,
    read_manifest,
)
from service.client.stream import SENDERS
from service.kit.text import counted

_SHOWN = 5  # names of what is left alone
_FAILURES = 20  # that are printed
_STOPPING = "Finishing what is on its way; Ctrl-C once more ends at once."


@dataclass
class Plan:
    """What is to be enrolled, what cannot be, and what is left alone."""

    entries: list[Entry] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left: list[Skipped] = field(default_factory=list)
    unmatched: list[Path] = field(default_factory=list)


@dataclass
class Tally:
    """What has become of the entries so far."""

    enrolled: int = 0
    before: int = 0
    failures: list[Failure] = field(default_factory=list)

    def add(self, result: EntryResult) -> None:
        """Count one more."""
        if result.item is not None:
            self.enrolled += 1
            self.before += result.status == 200
        else:
            assert isinstance(result.entry.image, Path)
            self.failures.append(failure_of(result, result.entry.image))


def enroll(
    paths: Annotated[
        list[Path] | None,
        # An empty one, as of an unset variable, would be the current folder.
        typer.Argument(
            metavar="PATH...",
            help="Files and folders; may be left out with --manifest.",
            parser=folder,
            show_default=False,
        ),
    ] = None,
    pattern: PatternOption = None,
    timezone: TimezoneOption = None,
    file_time: FileTime = False,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help=f"CSV in UTF-8, or JSON Lines, with the column file and any of "
            f"{', '.join(COLUMNS[1:])}. Its files are relative to it, and only those under PATH "
            "are enrolled."
        ),
    ] = None,
    ignore_column: Annotated[
        list[str] | None, typer.Option(help="Column of the manifest to leave out; repeat.")
    ] = None,
    person_id: Annotated[
        str | None, typer.Option(help="Label of all files that nothing else labels.")
    ] = None,
    camera_id: Annotated[
        str | None, typer.Option(help="Camera of all files that nothing else says one of.")
    ] = None,
    modality: ModalityOption = None,
    polarity: PolarityOption = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write what failed to this file, as CSV or (.jsonl) JSON Lines; give it back as "
            "--manifest to try again."
        ),
    ] = None,
    force: Force = False,
    url: Urls = None,
    senders: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="Requests on their way to each address; more where several devices are behind it.",
        ),
    ] = SENDERS,
    api_key: ApiKey = None,
) -> None:
    """Enroll image files, and all images in folders.

    May be interrupted and run again: a file that is enrolled already with the same labels is not
    enrolled twice. Files that fail are listed at the end, and the exit status is then 1. A manifest
    is checked as a whole before anything is sent.

    Example: cmt enroll crops --pattern '{camera}/{person}/*.jpg' --report failed.csv
    """
    if manifest is not None and pattern is not None:
        raise typer.BadParameter("--manifest and --pattern both say labels; give one of them")
    labels = naming(
        pattern,
        timezone,
        file_time=file_time,
        person_id=person_id,
        camera_id=camera_id,
        modality=modality,
        polarity=polarity,
    )
    target = None
    if report is not None:
        target = output(report, force=force or is_report(report), special=True)
    if manifest is not None:
        plan = Plan(_listed(manifest, paths or [], labels, ignore_column or []))
    elif paths:
        plan = _found(paths, labels)
    else:
        raise typer.BadParameter("name the files or folders to enroll, or give a --manifest")
    tally = Tally(failures=[*plan.failures])
    stopped: Exception | None = None
    interrupted = False
    if plan.entries:
        with ExitStack() as stack:
            addresses = dict.fromkeys(url or [DEFAULT_URL])
            clients = [stack.enter_context(Client(one, api_key=api_key)) for one in addresses]
            clients = _ready_first(clients)
            with stopping(_STOPPING) as wish:
                try:
                    send_with_progress(clients, plan.entries, tally, wish, senders)
                except (Unreachable, ServiceProblem, OtherGallery) as error:
                    stopped = error
                interrupted = wish.wanted
    tally.failures.sort(key=lambda failure: failure.file)
    print_tally(len(plan.entries) + len(plan.failures), tally, report)
    _print_left(plan)
    if target is not None:
        write_report(target, tally.failures)
    if interrupted or (stopped is not None and _passes(stopped)):
        say("Run the same command again to go on; nothing is enrolled twice.", err=True)
    if stopped is not None:
        raise stopped
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if tally.failures:
        raise typer.Exit(1)


def _ready_first(clients: Sequence[Client]) -> Sequence[Client]:
    """The services, those that answer first; the others may come back meanwhile.

    Says at once, not once per file, where there is none: raises Unreachable and ServiceProblem.
    """
    ready, errors = list[Client](), dict[Client, Unreachable | ServiceProblem]()
    for client in clients:
        try:
            client.ready()
            ready.append(client)
        except (Unreachable, ServiceProblem) as error:
            errors[client] = error
    if not ready:
        raise errors[clients[0]]
    for client, error in errors.items():
        say(f"{client.url} is not ready, the others are: {error}", err=True)
    return [*ready, *errors]


def _passes(error: Exception) -> bool:
    """Whether the same command may fare better later: not with a key that may not enroll."""
    if isinstance(error, ServiceProblem):
        return error.status not in (401, 403)
    return isinstance(error, Unreachable)


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
    _print_left(plan)
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


def send_with_progress(
    clients: Sequence[Client],
    entries: Sequence[Entry],
    tally: Tally,
    wish: Stopping | None = None,
    senders: int = SENDERS,
) -> None:
    """Enroll `entries` under a progress bar, and count in `tally`; until there is a wish to stop.

    Raises as `Client.enroll_many`.
    """
    client, *others = clients

    def wanted() -> Iterator[Entry]:
        for entry in entries:
            if wish is not None and wish.wanted:
                return
            yield entry

    console = Console(stderr=True)
    columns = (TextColumn("Enrolling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Where nobody looks, a bar would be a line in a log.
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("", total=len(entries))
        for result in client.enroll_many(wanted(), others=others, senders=senders):
            tally.add(result)
            bar.advance(task)


def print_tally(files: int, tally: Tally, report: Path | None = None) -> None:
    """Print how many files are enrolled, and why the first of the others failed.

    report: where all of them are.
    """
    before = f", {tally.before} of them before" if tally.before else ""
    say(f"{tally.enrolled} of {counted(files, 'file is', 'files are')} enrolled{before}.")
    for failure in tally.failures[:_FAILURES]:
        say(f"{failure.file}: {failure.reason}")
    if len(tally.failures) > _FAILURES:
        where = "--report FILE names all" if report is None else f"all are in {report}"
        say(f"{len(tally.failures) - _FAILURES} more failed; {where}.")


def _print_left(plan: Plan) -> None:
    """Print what was passed over: how many, and the names of the first."""
    if plan.unmatched:
        say(f"Left out by the pattern: {_named(plan.unmatched)}.")
    if plan.left:
        paths = [one.path for one in plan.left]
        say(f"Left alone, of other programs or read already: {_named(paths)}.")


def _named(paths: Sequence[Path]) -> str:
    more = ", …" if len(paths) > _SHOWN else ""
    return f"{len(paths)} ({', '.join(map(str, paths[:_SHOWN]))}{more})"
