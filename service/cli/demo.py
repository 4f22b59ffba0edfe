"""`cmt demo`: the service on its own examples, from an empty gallery to a ranked answer."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from model.atomic_file import PRIVATE, write_whole
from model.csv_table import read_table
from model.terminal import Console
from service.api.schemas import QueryAnswer
from service.cli.answers import headline, percent, sparkline, verdict
from service.cli.contact_sheet import Match, Row, SheetImage, matches, render
from service.cli.enroll import Tally, print_tally, send_with_progress
from service.cli.interrupts import stopping
from service.cli.outputs import Force, output
from service.client import Client
from service.client.bulk import read_manifest
from service.client.stream import Entry
from service.kit.text import counted

SHOWN = 5
_TITLE = "Infrared queries, visible gallery"
_MORNING, _APART = datetime(2026, 3, 1, 7, 0, tzinfo=UTC), timedelta(minutes=5)
_STOPPING = "Ending, and removing the gallery; Ctrl-C once more ends at once."
_ROLE = "role"  # the column that tells queries from the gallery


class DemoError(Exception):
    """The examples are not as the demo needs them; the message says the remedy."""


@dataclass(frozen=True)
class Example:
    """A query of the examples, and the person it shows."""

    file: Path
    person_id: str
    camera_id: str


@dataclass(frozen=True)
class Outcome:
    """One query's answers, ranked with modulation and without."""

    example: Example
    modulated: QueryAnswer
    unmodulated: QueryAnswer
    matches: list[Match]

    def right(self, answer: QueryAnswer) -> bool:
        """Whether the first result shows the person."""
        return bool(answer.results) and answer.results[0].item.person_id == self.example.person_id


def demo(
    examples: Annotated[Path, typer.Option(help="Folder with checkpoint and crops.")] = Path(
        "examples"
    ),
    html: Annotated[Path, typer.Option(help="Where the contact sheet goes.")] = Path(
        "contact-sheet.html"
    ),
    port: Annotated[int, typer.Option(help="Port; a free one if it is in use.")] = 8000,
    once: Annotated[
        bool, typer.Option("--once", help="End after the queries instead of serving on.")
    ] = False,
    force: Force = False,
) -> None:
    """Enroll the example gallery, run the infrared queries, and serve until Ctrl-C.

    The gallery lives in a new folder that goes away at the end. The exit status is 0 only if
    rank-1 reached what examples/expected.json states.

    Example: cmt demo --once
    """
    from service.server import ServerError, bind, running
    from service.settings import Settings

    console = Console()
    sheet = output(html, force=force or _is_own(html), special=True)
    manifest, checkpoint = examples / "manifest.csv", _checkpoint(examples)
    queries, expected = _queries(manifest), _expected(examples / "expected.json")
    try:
        bind("127.0.0.1", port).close()
    except ServerError:
        port = 0
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with (
        _private_files(),
        stopping(_STOPPING, raises=True) as wish,
        tempfile.TemporaryDirectory(prefix="cmt-demo-") as folder,
    ):
        wish.at_once = partial(_remove, Path(folder))
        settings = Settings(
            checkpoint=checkpoint,
            data_dir=Path(folder),
            port=port,
            # Whatever the environment says: the demo touches nothing but its own folder.
            host="127.0.0.1",
            database_url=None,
            crops_url=None,
            api_keys_file=None,
            cors_origins=(),
        )
        console.print(f"Loading {checkpoint} …")
        with running(settings) as url, Client(url) as client:
            card = client.model()
            console.print(f"Serving on {url}: {card.runtime} on {card.device}, {card.precision}")
            entries = _timed(read_manifest(manifest, [examples / "gallery"], ignored=[_ROLE]))
            tally = Tally()
            send_with_progress([client], entries, tally)
            print_tally(len(entries), tally)
            outcomes = [_run(client, query, len(entries), console) for query in queries]
            modulated = _rank1(outcomes, [outcome.modulated for outcome in outcomes])
            unmodulated = _rank1(outcomes, [outcome.unmodulated for outcome in outcomes])
            lines = [
                f"{counted(len(outcomes), 'infrared query', 'infrared queries')} against "
                f"{counted(len(entries), 'visible crop')}.",
                f"Rank-1 with modulation {modulated:.0%}, without {unmodulated:.0%}; "
                f"expected with modulation: at least {expected:.0%}.",
            ]
            write_whole(sheet, render(_TITLE, lines, _rows(outcomes)), PRIVATE)
            console.print()
            for line in (*lines, f"Contact sheet: {html.resolve()}"):
                console.print(line)
            if not once:
                console.print()
                for line in _invitation(outcomes):
                    console.print(line)
                console.print(f"{url}/")
                with suppress(KeyboardInterrupt):
                    threading.Event().wait()
    if tally.failures or modulated < expected:
        raise typer.Exit(1)


@contextmanager
def _private_files() -> Iterator[None]:
    """Within, whatever a library writes into the data folder is its owner's alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _remove(folder: Path) -> None:
    """Remove a folder into which a thread may still write."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def _timed(entries: Sequence[Entry]) -> list[Entry]:
    """The entries at invented times of one day: renderings have none, a timeline needs some."""
    return [
        replace(
            entry, item=entry.item.model_copy(update={"captured_at": _MORNING + place * _APART})
        )
        for place, entry in enumerate(entries)
    ]


def _invitation(outcomes: list[Outcome]) -> list[str]:
    """What to do on the page, whose address follows."""
    right = [outcome for outcome in outcomes if outcome.right(outcome.modulated)]
    picture = (right or outcomes)[0].example.file
    return [
        "The times at which the crops were captured are invented. Serving until Ctrl-C.",
        "Open this page in a browser, and drop a picture on it, such as",
        f"{picture}, or another one of that folder:",
    ]


def _is_own(html: Path) -> bool:
    """Whether a file is the contact sheet of an earlier demo."""
    try:
        with html.open("rb") as file:
            return f"<title>{_TITLE}</title>".encode() in file.read(1000)
    except OSError:
        return False


def _run(client: Client, example: Example, gallery: int, console: Console) -> Outcome:
    # All of the gallery comes back, so that bars that are not calibrated are relative to all of it.
    modulated = client.query(example.file, top_k=gallery, explain=True)
    unmodulated = client.query(example.file, modulation=False)
    outcome = Outcome(
        example, modulated, unmodulated, matches(client, modulated, SHOWN, example.person_id)
    )
    probable = verdict(modulated) is not None
    calibrated = any(match.result.similarity is not None for match in outcome.matches)
    table = Table(
        "",
        "person",
        "probability" if probable else "distance",
        *(["similarity"] if calibrated else []),
        "parts, head to feet",
        title_justify="left",
        box=None,
        pad_edge=False,
        title=f"{example.file.name}: person {example.person_id}, {modulated.query.modality} "
        f"({modulated.query.modality_source})",
    )
    for match in outcome.matches:
        result = match.result
        table.add_row(
            Text("✓", "green") if match.right else Text("✗", "red"),
            result.item.person_id,
            percent(result.probability) if probable else f"{result.distance:.3f}",
            *([_similarity(result.similarity)] if calibrated else []),
            f"{sparkline(match.bars)}  " + " ".join(f"{bar:.2f}" for bar in match.bars),
        )
    console.print()
    console.print_table(table)
    if probable:
        console.print(headline(modulated))
    return outcome


def _similarity(similarity: float | None) -> str:
    return "-" if similarity is None else f"{similarity:.3f}"


def _rows(outcomes: list[Outcome]) -> list[Row]:
    return [
        Row(
            title=f"person {outcome.example.person_id}",
            note=f"camera {outcome.example.camera_id}, {outcome.modulated.query.modality}; without "
            f"modulation rank 1 is {'right' if outcome.right(outcome.unmodulated) else 'wrong'}",
            pictures=[SheetImage(outcome.example.file.read_bytes(), "image/*")],
            answer=outcome.modulated,
            matches=outcome.matches,
        )
        for outcome in outcomes
    ]


def _rank1(outcomes: list[Outcome], answers: list[QueryAnswer]) -> float:
    """Share of queries whose first result shows the right person."""
    right = [outcome.right(answer) for outcome, answer in zip(outcomes, answers, strict=True)]
    return sum(right) / len(right)


def _checkpoint(examples: Path) -> Path:
    found = sorted(examples.glob("*.safetensors"))
    if len(found) != 1:
        raise DemoError(
            f"{examples} holds {counted(len(found), '.safetensors file')} and must hold one; "
            "run this in a clone of the repository, or give --examples"
        )
    return found[0]


def _queries(manifest: Path) -> list[Example]:
    table = read_table(manifest, ("file", "person_id", "camera_id", _ROLE))
    queries = [
        Example(manifest.parent / row["file"], row["person_id"], row["camera_id"])
        for _, row in table.rows
        if row[_ROLE] == "query"
    ]
    if not queries:
        raise DemoError(f"{manifest} names no query; restore it from the repository")
    return queries


def _expected(file: Path) -> float:
    """The rank-1, from 0 to 1, that the queries reach with modulation."""
    try:
        return float(json.loads(file.read_text())["rank1"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(
            f'{file} must hold {{"rank1": …}}; restore it from the repository'
        ) from error
