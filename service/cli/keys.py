"""`cmt keys`: the file of API keys."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from model.terminal import Console, say, say_json
from service.auth.keys import KeyFile
from service.cli.options import AsJson, KeyScope, KeysFile

keys = typer.Typer(
    help="Make, list and revoke API keys; a running service notices at once.\n\n"
    "Example: cmt keys create --file keys.json --name desk --scope query"
)


@keys.command()
def create(
    file: KeysFile,
    scopes: Annotated[
        list[KeyScope],
        typer.Option(
            "--scope", help="query finds and looks, enroll adds and deletes, admin erases persons."
        ),
    ],
    name: Annotated[str, typer.Option(help="Who will use it.")] = "unnamed",
    rate: Annotated[
        str | None, typer.Option(help="Requests that it may make, such as 50/second.")
    ] = None,
) -> None:
    """Make a key and print it, this once; the file keeps only its hash.

    Example: cmt keys create --file keys.json --name gate --scope query --scope enroll
    """
    _, token = KeyFile(file).create(name, [scope.value for scope in scopes], rate)
    say(token)


@keys.command("list")
def list_keys(file: KeysFile, json: AsJson = False) -> None:
    """List the keys: ids, names, scopes; the keys themselves are stored nowhere.

    Example: cmt keys list --file keys.json
    """
    stored = KeyFile(file).read()
    if json:
        shown = {"id", "name", "scopes", "created_at"}
        say_json("[" + ",\n ".join(key.model_dump_json(include=shown) for key in stored) + "]")
        return
    table = Table(Column("id", no_wrap=True), "name", "scopes", "made")
    for key in stored:
        made = f"{key.created_at:%Y-%m-%d %H:%M} UTC"
        table.add_row(key.id, key.name, " ".join(sorted(key.scopes)), made)
    Console().print_table(table)


@keys.command()
def revoke(file: KeysFile, key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Revoke a key; the next request with it is refused.

    Example: cmt keys revoke --file keys.json 1f3a9c02
    """
    key = KeyFile(file).revoke(key_id)
    say(f"Revoked {key.id} ({key.name}).")
