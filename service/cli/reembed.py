"""`cmt reembed`: the gallery's features by another checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.device import DEVICES
from model.terminal import say
from service.cli.options import DEFAULT_URL, ApiKey, CropsUrl, Url, data_dir_option
from service.client import Client

_EVERY = 1.0  # seconds between two requests for its progress


class ReembedFailed(Exception):  # noqa: N818 (what happened)
    """Re-embedding did not finish; the message says why."""


def reembed(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="A file: with a running service the name of one beside its own checkpoint, with "
            "--data-dir its path. Without it the service's own."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, data_dir_option("Work on this folder, while no service runs on it.")
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(envvar="CMT_DATABASE_URL", help="With --data-dir: its database.")
    ] = None,
    device: Annotated[
        str, typer.Option(envvar="CMT_DEVICE", help=f"With --data-dir: {DEVICES}.")
    ] = "auto",
    crops_url: CropsUrl = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Embed every enrolled crop with another checkpoint, then search with that one.

    Until it is done, all goes on with the old features. May be interrupted and started again: it
    goes on where it was. Start the service with the new checkpoint from then on.

    Example: cmt reembed new.safetensors
    """
    if data_dir is not None:
        if checkpoint is None:
            raise typer.BadParameter("with --data-dir give the path of the checkpoint")
        _offline(Path(checkpoint), data_dir, database_url, crops_url, device)
    else:
        with Client(url, api_key=api_key) as client:
            _online(client, checkpoint)
    say("All items are embedded; start the service with this checkpoint from now on.")


def _online(client: Client, checkpoint: str | None) -> None:
    status = client.reembed(checkpoint)
    with _bar() as bar:
        task = bar.add_task("", total=None)
        while status.state == "running":
            bar.update(task, completed=status.done, total=status.total or None)
            time.sleep(_EVERY)
            status = client.reembed_status()
        bar.update(task, completed=status.done, total=status.total)
    if status.state != "done":
        raise ReembedFailed(status.detail or "it was stopped; start it again")


def _offline(
    checkpoint: Path,
    data_dir: Path,
    database_url: str | None,
    crops_url: str | None,
    device: str,
) -> None:
    from service.embedding.embedder import Embedder
    from service.gallery import Gallery
    from service.gallery import Progress as Step

    embedder = Embedder(checkpoint, device, cache_dir=data_dir / "cache")
    gallery = Gallery.open(
        data_dir,
        embedder.info,
        device=embedder.device,
        database_url=database_url,
        crops_url=crops_url,
    )
    try:
        with _bar() as bar:
            task = bar.add_task("", total=None)

            def show(step: Step) -> None:
                bar.update(task, completed=step.done, total=step.total)

            gallery.reembed(embedder.info, embedder.embed, progress=show, actor="cmt reembed")
    finally:
        gallery.close()


def _bar() -> Progress:
    return Progress(
        TextColumn("Embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
