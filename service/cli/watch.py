"""`cmt watch`: enroll what a camera or a recorder drops into a folder, each file once.

The folder is listed again and again, rather than asking the system for notices: those do not come
from network shares, get lost when many files arrive, and say nothing of what came while nobody
watched. A file is whole when it has looked the same for a while.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from model.terminal import say
from service.cli.interrupts import INTERRUPTED, stopping
from service.cli.journal import Journal
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
    Url,
    folder,
)
from service.cli.outputs import refuse_data_folder
from service.cli.watcher import Done, Watcher
from service.client import Client
from service.client.bulk import EnrollmentError
from service.kit.text import counted

_STOPPING = "Finishing what is on its way; the journal knows how to go on."


def watch(
    watched: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What is watched, to any depth.", parser=folder)
    ],
    pattern: PatternOption = None,
    timezone: TimezoneOption = None,
    file_time: FileTime = False,
    person_id: Annotated[
        str | None, typer.Option(help="Label of all files that nothing else labels.")
    ] = None,
    camera_id: Annotated[
        str | None, typer.Option(help="Camera of all files that nothing else says one of.")
    ] = None,
    modality: ModalityOption = None,
    polarity: PolarityOption = None,
    done: Annotated[
        Done,
        typer.Option(
            help="What happens to a file once it is enrolled. move: it goes to "
            "FOLDER.done/enrolled, and what was refused to FOLDER.done/failed. Otherwise the "
            "latter is left."
        ),
    ] = "leave",
    move_to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="In place of FOLDER.done.", parser=folder)
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Enroll what is there and whole, and end: for cron.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="How often the folder is listed.")
    ] = 2.0,
    settle: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long a whole file has looked the same."),
    ] = 3.0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what was refused before.")
    ] = False,
    journal: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to remember what is done. Default: FOLDER.cmt-watch.sqlite3, beside it.",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Enroll what arrives in a folder, each file once, until Ctrl-C or SIGTERM.

    Waits for files to be whole and for a service that is busy, restarts or has a full disk. A file
    that is overwritten is enrolled anew; one that is renamed is not. What the service refuses is
    said, remembered and not tried again until it changes. With --once the exit status is 1 if a
    file failed in this run, not in an earlier one.

    Example: cmt watch /srv/nvr --pattern '{camera}/{time:%Y%m%d-%H%M%S}*.jpg' --timezone UTC
    """
    if not watched.is_dir():
        raise EnrollmentError(f"there is no folder {watched}; make it, or give another")
    home = watched.resolve()
    if not home.name and (journal is None or (done == "move" and move_to is None)):
        raise typer.BadParameter("nothing is beside the folder /; give --journal and --move-to")
    labels = naming(
        pattern,
        timezone,
        file_time=file_time,
        person_id=person_id,
        camera_id=camera_id,
        modality=modality,
        polarity=polarity,
    )
    place = journal or home.with_name(f"{home.name}.cmt-watch.sqlite3")
    aside = (move_to or home.with_name(f"{home.name}.done")).resolve()
    for one in (watched, place.parent, aside):
        refuse_data_folder(one)
    with (
        closing(Journal(place)) as known,
        # It tells at once that it is refused; how long to wait is decided here.
        Client(url, api_key=api_key, retries=0) as client,
        stopping(_STOPPING) as wish,
    ):
        if retry_failed:
            known.write([], [row.name for row in known.rows.values() if row.state == "failed"])
        watcher = Watcher(home, client, known, labels, done, aside, settle, wish)
        if once:
            watcher.run_once()
        else:
            say(f"Watching {home}, until Ctrl-C. The journal is {place}.")
            watcher.run(interval)
        _print_end(watcher, once=once)
    if once and wish.wanted:
        raise typer.Exit(INTERRUPTED)
    if once and watcher.troubled:
        raise typer.Exit(1)


def _print_end(watcher: Watcher, *, once: bool) -> None:
    """Print what a run has done, and what it leaves."""
    say(f"{counted(watcher.enrolled, 'file')} enrolled, {watcher.failed} refused.")
    if not once:
        say("The same command goes on from here.")
        return
    if watcher.left:
        say(f"Left for the next time: {watcher.left}, still being written or not readable now.")
    earlier = sum(row.state == "failed" for row in watcher.journal.rows.values()) - watcher.failed
    if earlier > 0:
        say(f"Refused in earlier runs: {earlier}; --retry-failed tries them again.")
