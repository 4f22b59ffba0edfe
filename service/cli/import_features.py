"""`cmt import`: files of features into a gallery."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from model.terminal import say
from service.cli.failures import Failure, report_place, write_report
from service.cli.interrupts import INTERRUPTED, stopping
from service.cli.options import data_dir_option, folder
from service.cli.outputs import Force
from service.cli.planning import Report, print_failures, progress_bar
from service.kit.text import counted

_ACTOR = "command line"
_STOPPING = "Finishing what is on its way; Ctrl-C once more ends at once."


def import_features(
    features: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", parser=folder, help="What `cmt embed-bulk --out` wrote."),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="The one that made the features; CMT_CHECKPOINT names one too."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        data_dir_option("Folder of a gallery that no service has open; made if missing."),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="CMT_DATABASE_URL",
            help="A PostgreSQL database, while services use it or not; needs no data folder.",
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="Random crops that are embedded again, to compare.")
    ] = 64,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Import what an interrupted embed-bulk has.")
    ] = False,
    served_elsewhere: Annotated[
        bool,
        typer.Option(
            "--served-elsewhere",
            help="By machines with more memory: import what this one could not serve.",
        ),
    ] = False,
    report: Report = None,
    force: Force = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of the service's settings, such as its limits.")
    ] = None,
) -> None:
    """Load the features that `cmt embed-bulk` wrote into a gallery, checked, as items.

    A row counts as imported once it is on the disk. May be interrupted and run again, also after
    `cmt enroll` of the same pictures: nothing is added twice. Rows that fail are listed at the end,
    and the exit status is then 1.

    Example: cmt import features --checkpoint model.safetensors --data-dir data
    """
    from service.bulk.features import BulkError, FeatureFolder, arrow_parquet
    from service.settings import load_settings

    arrow_parquet()  # a package that is missing is told before the work
    target = report_place(report, force=force)
    source = FeatureFolder(features)
    files = source.files() if unfinished else source.complete()
    if not files:
        raise BulkError(f"{features} holds no features; name a folder that `cmt embed-bulk` wrote")
    with ExitStack() as stack:
        shared = database_url is not None and not database_url.startswith("sqlite")
        if shared:  # the data folder of a service on this machine is in use
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="cmt-import-"))
            data_dir = Path(place)
        settings = load_settings(
            config,
            checkpoint=checkpoint,
            data_dir=data_dir,
            database_url=database_url,
            host="127.0.0.1",
        )
        from service.bulk.importing import importing

        with (
            importing(settings, files, served_elsewhere=served_elsewhere) as run,
            stopping(_STOPPING) as wish,
        ):
            run.verify(files, sample)
            total = sum(file.count for file in files)
            try:
                with progress_bar("Importing") as bar:
                    task = bar.add_task("", total=total)
                    run.add(
                        files,
                        actor=_ACTOR,
                        advance=lambda count: bar.advance(task, count),
                        stopping=lambda: wish.wanted,
                    )
            finally:
                tally = run.tally
                failures = [
                    Failure(Path(one.path), one.code, one.reason, one.labels)
                    for one in tally.refused
                ]
                before = f", {tally.before:,} of them before" if tally.before else ""
                rows = counted(total, "row is", "rows are")
                say(f"{tally.imported:,} of {rows} imported{before}.")
                if tally.embedded_again:
                    say(
                        f"{tally.embedded_again:,} of them were embedded again, since the "
                        "gallery's cameras have them read otherwise."
                    )
                print_failures(failures, report)
                if target is not None:
                    write_report(target, failures)
            if wish.wanted:
                say("Run the same command again to go on; nothing is added twice.", err=True)
                raise typer.Exit(INTERRUPTED)
    if failures:
        raise typer.Exit(1)
