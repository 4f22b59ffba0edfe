"""`cmt enroll`: files and folders into the gallery of a running service."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from model.terminal import say
from service.cli.failures import Failure, failure_of, report_place, write_report
from service.cli.interrupts import INTERRUPTED, Stopping, stopping
from service.cli.naming import (
    FileTime,
    PatternOption,
    TimezoneOption,
    naming,
)
from service.cli.options import (
    DEFAULT_URL,
    ApiKey,
    ModalityOption,
    PolarityOption,
    Urls,
    folder,
)
from service.cli.outputs import Force
from service.cli.planning import (
    CameraId,
    IgnoreColumn,
    ManifestOption,
    PersonId,
    Report,
    planned,
    print_failures,
    print_left,
    progress_bar,
)
from service.client import Client, Entry, EntryResult, OtherGallery, ServiceProblem, Unreachable
from service.client.stream import SENDERS
from service.kit.text import counted

_STOPPING = "Finishing what is on its way; Ctrl-C once more ends at once."


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
    manifest: ManifestOption = None,
    ignore_column: IgnoreColumn = None,
    person_id: PersonId = None,
    camera_id: CameraId = None,
    modality: ModalityOption = None,
    polarity: PolarityOption = None,
    report: Report = None,
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
    target = report_place(report, force=force)
    plan = planned(paths or [], manifest, labels, ignore_column or [])
    tally = Tally(failures=[*plan.failures])
    stopped: Exception | None = None
    interrupted = False
    if plan.entries:
        with ExitStack() as stack:
            addresses = dict.fromkeys(url or [DEFAULT_URL])
            clients = _ready_first(
                [stack.enter_context(Client(one, api_key=api_key)) for one in addresses]
            )
            with stopping(_STOPPING) as wish:
                try:
                    send_with_progress(clients, plan.entries, tally, wish, senders)
                except (Unreachable, ServiceProblem, OtherGallery) as error:
                    stopped = error
                interrupted = wish.wanted
    tally.failures.sort(key=lambda failure: failure.file)
    print_tally(len(plan.entries) + len(plan.failures), tally, report)
    print_left(plan)
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
    ready, silent = list[Client](), dict[Client, Unreachable | ServiceProblem]()
    for client in clients:
        try:
            client.ready()
            ready.append(client)
        except (Unreachable, ServiceProblem) as error:
            silent[client] = error
    if not ready:
        raise silent[clients[0]]
    for client, why in silent.items():
        say(f"{client.url} is not ready, the others are: {why}", err=True)
    return [*ready, *silent]


def _passes(error: Exception) -> bool:
    """Whether the same command may fare better later: not with a key that may not enroll."""
    if isinstance(error, ServiceProblem):
        return error.status not in (401, 403)
    return isinstance(error, Unreachable)


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

    with progress_bar("Enrolling") as bar:
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
    print_failures(tally.failures, report)
