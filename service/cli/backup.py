"""`cmt backup` and `cmt restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model.terminal import say
from service.cli.options import (
    DEFAULT_URL,
    ApiKey,
    CropsUrl,
    DatabaseUrl,
    Url,
    data_dir_option,
    folder,
)
from service.cli.outputs import Force, output
from service.client import Client
from service.kit.text import counted

_ACTOR = "command line"


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Such as gallery.zip.")],
    force: Force = False,
    data_dir: Annotated[
        Path | None, data_dir_option("Work offline on a folder that no service has open.")
    ] = None,
    database_url: DatabaseUrl = None,
    crops_url: CropsUrl = None,
    temp_dir: Annotated[
        Path | None,
        typer.Option(
            help="Offline: where a temporary copy goes, instead of the data folder.",
            metavar="DIR",
            parser=folder,
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Write all that a gallery holds into one file, from a running service or offline.

    The file has every label and every crop, also those of an object storage, and can be read by
    its owner only. It is checked before it gets its name: what was there before stays until then.

    Example: cmt backup gallery.zip
    """
    from service.gallery.backup.archive import peek
    from service.gallery.backup.backup import offline

    target = output(file, force=force)
    if data_dir is None:
        if temp_dir is not None:
            raise typer.BadParameter("--temp-dir needs --data-dir; a service uses its data folder")
        with Client(url, api_key=api_key) as client:
            client.backup(target)
    else:
        with offline(data_dir, database_url, crops_url) as backups:
            backups.write(target, actor=_ACTOR, folder=temp_dir)
    size = target.stat().st_size
    say(f"Wrote {file}: {counted(peek(target).counts['items'], 'item')}, {size / 1e6:,.1f} MB.")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `cmt backup` wrote.")],
    data_dir: Annotated[Path, data_dir_option("Data folder of a new gallery.", variable=True)],
    database_url: DatabaseUrl = None,
) -> None:
    """Make a new gallery of a backup, all or nothing; no service may have the folder open.

    Either database takes the backup of either: with --database-url the rows go there. All crops
    go into the database; `cmt crops move` puts large ones into a bucket.

    Example: cmt restore gallery.zip --data-dir data
    """
    from service.gallery.backup.restore import restore as fill

    manifest = fill(file, data_dir, database_url, actor=_ACTOR)
    items = counted(manifest.counts["items"], "item")
    say(
        f"Restored {items} of {manifest.created_at:%Y-%m-%d %H:%M:%S} "
        f"UTC; start the service with --data-dir {data_dir}."
    )
