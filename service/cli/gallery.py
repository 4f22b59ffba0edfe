"""`cmt gallery`: look at what is enrolled, and delete it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from service.cli.options import DEFAULT_URL, PLAIN, ApiKey, AsJson, Client, Modality, Url

gallery = typer.Typer(
    help="List, show and delete enrolled crops.\n\nExample: cmt gallery list --person-id 17"
)

PAGE = 1000


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
                    typer.echo(item.model_dump_json())
                table.add_row(
                    item.id,
                    escape(item.person_id or "-"),
                    escape(item.camera_id or "-"),
                    item.modality,
                    f"{item.enrolled_at:%Y-%m-%d %H:%M}",
                )
            shown, cursor = shown + len(page.items), page.next_cursor
            if cursor is None or shown >= limit:
                break
    if not json:
        Console().print(table)
        typer.echo(f"{shown} of {page.total}")


@gallery.command()
def show(
    item_id: Annotated[str, typer.Argument(metavar="ID")],
    save: Annotated[Path | None, typer.Option(help="Write the stored crop to this file.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show one item as JSON, and save its crop.

    Example: cmt gallery show 0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10 --save crop.png
    """
    with Client(url, api_key=api_key) as client:
        typer.echo(client.get(item_id).model_dump_json(indent=2))
        if save is not None:
            save.write_bytes(client.image(item_id)[0])


@gallery.command()
def delete(
    item_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...")] = None,
    person_id: Annotated[str | None, typer.Option(help="Erase everything of a person.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Delete items, or erase a person. There is no way back.

    Example: cmt gallery delete --person-id 17 --yes
    """
    if bool(item_ids) == (person_id is not None):
        raise typer.BadParameter("give either ids or --person-id")
    what = f"everything of person {person_id}" if person_id is not None else "these items"
    if not yes:
        typer.confirm(f"Delete {what}?", abort=True)
    with Client(url, api_key=api_key) as client:
        if person_id is not None:
            typer.echo(f"Deleted {client.erase(person_id)} items.")
            return
        for item_id in item_ids or []:
            client.delete(item_id)
        typer.echo(f"Deleted {len(item_ids or [])} items.")
