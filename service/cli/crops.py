"""`cmt crops`: where the crops of a gallery are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model.terminal import say
from service.cli.interrupts import INTERRUPTED, stopping
from service.cli.options import CropsUrl, DatabaseUrl, data_dir_option
from service.cli.planning import progress_bar
from service.kit.text import counted

_STOPPING = "Finishing what is on its way; Ctrl-C once more ends at once."

crops = typer.Typer(
    no_args_is_help=True,
    help="Where crops are: database or bucket.\n\nExample: cmt crops move --data-dir data",
)


@crops.callback()
def _crops() -> None:
    """Without it a Typer with one command would be that command."""


@crops.command()
def move(
    data_dir: Annotated[Path, data_dir_option("Data folder of the gallery.", variable=True)],
    database_url: DatabaseUrl = None,
    crops_url: CropsUrl = None,
    inline_bytes: Annotated[
        int,
        typer.Option(
            envvar="CMT_CROPS_INLINE_BYTES", min=0, help="Up to this size in the database."
        ),
    ] = 65_536,
    back: Annotated[
        bool, typer.Option("--back", help="All into the database, so that no bucket is needed.")
    ] = False,
) -> None:
    """Move every crop to where a new one of its size would be stored.

    May be interrupted and run again: it goes on where it was. An SQLite gallery must not be in use
    meanwhile; one on PostgreSQL may, with another data folder here than the service's.

    Example: cmt crops move --data-dir data --crops-url s3://bucket/gallery
    """
    from service.gallery.storage.offline import opened_crops

    if crops_url is None:
        raise typer.BadParameter("give --crops-url, or set CMT_CROPS_URL")
    moved = 0
    with (
        opened_crops(data_dir, database_url, crops_url, inline_bytes) as place,
        stopping(_STOPPING) as wish,
    ):
        try:
            with progress_bar("Moving") as bar:
                task = bar.add_task("", total=place.to_move(back=back))
                for count in place.move(back=back):
                    moved += count
                    bar.advance(task, count)
                    if wish.wanted:
                        break
        finally:
            inside, outside = place.counts()
            say(
                f"Moved {counted(moved, 'crop')}: {inside:,} are in the database now, and "
                f"{outside:,} in the bucket."
            )
    if wish.wanted:
        say("Run the same command again to go on.", err=True)
        raise typer.Exit(INTERRUPTED)
