"""`cmt gallery`: list, show, export and delete what is enrolled."""

from __future__ import annotations

import csv
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from model.atomic_file import PRIVATE, whole_file, write_whole
from model.terminal import Console, printable, say, say_json
from service.cli.options import DEFAULT_URL, PLAIN, ApiKey, AsJson, Modality, Url
from service.cli.outputs import Force, output, refuse_data_folder
from service.client import Client
from service.client.bulk import EXPORTED, manifest_row
from service.client.requests import ListFields, item_path
from service.kit.text import counted

gallery = typer.Typer(
    help="List, show, export and delete enrolled crops.\n\nExample: cmt gallery list --person-id 17"
)

PAGE = 1000
_PRIVATE_FOLDER = 0o700
_ITEMS, _MANIFEST = "items.jsonl", "manifest.csv"
_PARTIAL = ".partial"
_SHORT = 12  # digits of a fingerprint that tell checkpoints apart


class ErasureError(Exception):
    """Nothing of a person was found; the message says the remedy."""


@gallery.command("list")
def list_items(
    person_id: Annotated[list[str] | None, typer.Option(help="Any of these; repeat.")] = None,
    camera_id: Annotated[list[str] | None, typer.Option(help="Any of these; repeat.")] = None,
    modality: Annotated[list[Modality] | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List items in the order of enrollment.

    Example: cmt gallery list --person-id 17 --camera-id gate --limit 20
    """
    table = Table(
        Column("id", no_wrap=True), "person", "camera", "modality", "enrolled (UTC)", **PLAIN
    )
    shown, cursor = 0, None
    with Client(url, api_key=api_key) as client:
        while True:
            page = client.list(
                person_id=person_id,
                camera_id=camera_id,
                modality=modality,
                limit=min(PAGE, limit - shown),
                cursor=cursor,
            )
            for item in page.items:
                if json:
                    say_json(item.model_dump_json())
                table.add_row(
                    item.id,
                    item.person_id or "-",
                    item.camera_id or "-",
                    item.modality,
                    f"{item.enrolled_at:%Y-%m-%d %H:%M}",
                )
            shown, cursor = shown + len(page.items), page.next_cursor
            if cursor is None or shown >= limit:
                break
    if not json:
        Console().print_table(table)
        say(f"{shown} of {page.total}")
    elif cursor is not None:
        say(f"{shown} of {page.total}; --limit {page.total} prints all", err=True)


@gallery.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Made if missing.")],
    person_id: Annotated[list[str] | None, typer.Option(help="Any of these; repeat.")] = None,
    camera_id: Annotated[list[str] | None, typer.Option(help="Any of these; repeat.")] = None,
    modality: Annotated[list[Modality] | None, typer.Option()] = None,
    force: Force = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Write crops, items.jsonl and a manifest.csv that `cmt enroll --manifest` reads.

    May be interrupted and run again: crops that are there already are not fetched twice, and the
    two lists of an earlier export are replaced. Files are readable by their owner only.

    Example: cmt gallery export out --camera-id gate
    """
    refuse_data_folder(folder)
    folder.mkdir(_PRIVATE_FOLDER, parents=True, exist_ok=True)
    again = force or _is_export(folder)
    items, manifest = (output(folder / name, force=again) for name in (_ITEMS, _MANIFEST))
    filters: ListFields = {
        "person_id": person_id,
        "camera_id": camera_id,
        "modality": modality,
        "limit": PAGE,
        "cursor": None,
    }
    there = {file.stem: file.name for file in folder.iterdir() if file.suffix != _PARTIAL}
    count = 0
    with (
        Client(url, api_key=api_key) as client,
        whole_file(items) as lines,
        whole_file(manifest) as table,
    ):
        text = TextIOWrapper(table, "utf-8", newline="", write_through=True)
        rows = csv.writer(text)
        rows.writerow(EXPORTED)
        while True:
            page = client.list(**filters)
            for item in page.items:
                name = there.get(item.id) or _fetch(client, item.id, folder)
                lines.write(item.model_dump_json().encode() + b"\n")
                rows.writerow(manifest_row(name, item))
            count += len(page.items)
            filters["cursor"] = page.next_cursor
            if page.next_cursor is None:
                break
        text.detach()  # the file is closed where it was opened
    say(f"{counted(count, 'crop is', 'crops are')} in {folder}.")


def _fetch(client: Client, item_id: str, folder: Path) -> str:
    """Write an item's crop into `folder`, completely or not at all → the file's name."""
    data, media_type = client.image(item_id)
    file = folder / f"{item_id}.{media_type.removeprefix('image/')}"
    write_whole(file, data, PRIVATE)
    return file.name


def _is_export(folder: Path) -> bool:
    """Whether the lists in a folder are those of an earlier export."""
    try:
        with (folder / _MANIFEST).open(encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error):
        return False
    return header == list(EXPORTED) and (folder / _ITEMS).is_file()


@gallery.command()
def show(
    item_id: Annotated[str, typer.Argument(metavar="ID")],
    save: Annotated[Path | None, typer.Option(help="Write the stored crop to this file.")] = None,
    force: Force = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show one item as JSON, and save its crop.

    Example: cmt gallery show 0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10 --save crop.png
    """
    file = None if save is None else output(save, force=force, special=True)
    with Client(url, api_key=api_key) as client:
        say_json(client.get(item_id).model_dump_json(indent=2))
        if file is not None:
            write_whole(file, client.image(item_id)[0], PRIVATE)


@gallery.command()
def delete(
    item_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...")] = None,
    person_id: Annotated[str | None, typer.Option(help="Erase everything of a person.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Delete items, or erase a person. There is no way back.

    The exit status is 1 where no item has that person, as with a mistyped label.

    Example: cmt gallery delete --person-id 17 --yes
    """
    if bool(item_ids) == (person_id is not None):
        raise typer.BadParameter("give either ids or --person-id")
    for item_id in item_ids or []:
        item_path(item_id)  # all are ids, or none is deleted
    what = f"everything of person {person_id}" if person_id is not None else "these items"
    if not yes:
        typer.confirm(printable(f"Delete {what}?"), abort=True)
    with Client(url, api_key=api_key) as client:
        if person_id is not None:
            erasure = client.erasure(person_id)
            if not erasure.deleted:
                raise ErasureError(
                    f"no item has the person {person_id!r}, so that nothing was deleted; labels "
                    "are compared to the letter, and `cmt gallery list` shows them"
                )
            erasures = [erasure]
        else:
            erasures = [client.delete(item_id) for item_id in item_ids or []]
    say(f"Deleted {counted(sum(one.deleted for one in erasures), 'item')}.")
    if pending := sum(one.pending for one in erasures):
        say(
            f"The object storage does not answer: it still has {counted(pending, 'picture')}, "
            "which nothing finds, and deletes them once it does.",
            err=True,
        )


versions = typer.Typer(
    no_args_is_help=True,
    help="Checkpoints whose features the gallery holds.\n\nExample: cmt gallery versions list",
)
gallery.add_typer(versions, name="versions")


@versions.command("list")
def list_versions(json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List the checkpoints, oldest first, with how many items are embedded with each.

    Example: cmt gallery versions list
    """
    table = Table(
        Column("fingerprint", no_wrap=True),
        "state",
        Column("items", justify="right"),
        "since (UTC)",
        **PLAIN,
    )
    with Client(url, api_key=api_key) as client:
        for version in client.versions():
            if json:
                say_json(version.model_dump_json())
            table.add_row(
                version.fingerprint[:_SHORT],
                version.state,
                f"{version.embedded:,}",
                f"{version.created_at:%Y-%m-%d %H:%M}",
            )
    if not json:
        Console().print_table(table)


@versions.command("drop")
def drop_version(
    fingerprint: Annotated[
        str, typer.Argument(help="Of the checkpoint, or enough of its first digits.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Remove a checkpoint's features. Items and crops stay; the one in use cannot go.

    Example: cmt gallery versions drop 3f1f6f6f2a10
    """
    with Client(url, api_key=api_key) as client:
        fitting = [v for v in client.versions() if v.fingerprint.startswith(fingerprint)]
        if len(fitting) > 1:
            raise typer.BadParameter(
                f"{len(fitting)} checkpoints begin with {fingerprint!r}; give more digits"
            )
        if not fitting:
            raise typer.BadParameter(
                f"no checkpoint begins with {fingerprint!r}; `cmt gallery versions list` has them"
            )
        [version] = fitting
        name, items = version.fingerprint[:_SHORT], counted(version.embedded, "item")
        if not yes:
            typer.confirm(f"Drop the features of {items} by {name}?", abort=True)
        client.drop_version(version.fingerprint)
        say(f"Dropped the features of {items} by {name}.")
