"""`cmt bench all`: what the benchmarks found, as one table, ours beside its rival.

The module of a benchmark that belongs into the table has two names beside its command: `QUICK`, the
options with which it takes about a minute, and `headlines`, which reads the results in its JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.table import Table

from model.atomic_file import write_whole
from model.outputs import OutputError, check_folder, folder_option
from model.terminal import Console, say

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
CMT = (sys.executable, "-c", "import sys; from model.cli import main; sys.exit(main())")
"""The `cmt` of this interpreter, as the beginning of a command."""
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@dataclass(frozen=True)
class Headline:
    """A row: what was measured, ours and its rival's in the same run on the same machine.

    ours, theirs: a figure with its unit and spread. times: how many times as fast as the rival
    ours is. rival, theirs and times are empty where nothing was measured beside.
    """

    what: str
    ours: str
    rival: str = ""
    theirs: str = ""
    times: str = ""


def duration(spread: dict[str, float]) -> str:
    """Seconds as JSON holds a `Spread`, in the unit that fits the median."""
    size, unit = next((u for u in _UNITS if spread["median"] >= u[0]), _UNITS[-1])
    return f"{_spread(spread, 1 / size)} {unit}"


def rate(spread: dict[str, float], unit: str) -> str:
    """Things a second, such as `rate(…, "crops")`."""
    return f"{_spread(spread)} {unit}/s"


def as_fast(ratio: dict[str, float]) -> str:
    """How many times as fast, from a ratio that is above 1 where ours is faster."""
    return _spread(ratio)


def inverse(ratio: dict[str, float]) -> dict[str, float]:
    """The same the other way round: a share of the rival's time, as times as fast."""
    return {
        "median": 1 / ratio["median"],
        "least": 1 / ratio["most"],
        "most": 1 / ratio["least"],
    }


def ratio_of(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """Ours by theirs where rounds were not kept in pairs: the widest spread that both allow."""
    return {
        "median": ours["median"] / theirs["median"],
        "least": ours["least"] / theirs["most"],
        "most": ours["most"] / theirs["least"],
    }


def all_benchmarks(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes and few rounds: ten minutes at most.")
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(help="Keep the JSON of each benchmark here.", callback=folder_option),
    ] = None,
    taken: Annotated[
        Path | None,
        typer.Option(
            "--from", exists=True, file_okay=False, help="Measure nothing: a folder of such JSON."
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Write the table of --from into this document."
        ),
    ] = None,
) -> None:
    """Run the benchmarks and print one table: ours beside its rival on this machine.

    Without --quick each runs with its own defaults, an hour or more in all. Keep other work off
    the machine meanwhile. What fails is said, and the others go on.

    Example: cmt bench all --quick
    """
    if (markdown is not None and taken is None) or (taken is not None and (quick or results)):
        raise typer.BadParameter("--from goes with --markdown alone, and --markdown with --from")
    if markdown is not None and taken is not None:
        _write_into(markdown, table_in_markdown(taken, markdown.parent))
        say(f"written into {markdown}")
        return
    if taken is not None:
        _print(reports(taken))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = results or Path(scratch)
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        failed = _run(folder, quick=quick)
        _print(reports(folder))
    if failed:
        raise typer.Exit(1)


def reports(folder: Path) -> list[dict[str, Any]]:
    """The reports in the folder's JSON files that belong into the table, each with its `path`.

    In the order of the benchmarks' names; files of anything else are left out.
    """
    names = list(_benchmarks())
    found = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if isinstance(report, dict) and report.get("benchmark") in names:
            found.append({**report, "path": path})
    return sorted(found, key=lambda report: names.index(report["benchmark"]))


def table_in_markdown(folder: Path, base: Path) -> str:
    """The table of a folder's reports with machine and file; links are relative to `base`."""
    lines = [
        "| | ours | against | theirs | times as fast | file and machine |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports(folder):
        path: Path = report["path"]
        machine = report["machine"]
        where = f"[{path.name}]({os.path.relpath(path, base)}), {machine['gpu'] or machine['cpu']}"
        for row in _headlines(report):
            cells = (row.what, row.ours, row.rival, row.theirs, row.times, where)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _benchmarks() -> dict[str, tuple[EntryPoint, ModuleType]]:
    """Name → a registered benchmark that belongs into the table, in the order of names."""
    found = {}
    for entry_point in sorted(entry_points(group="cmt.benchmarks"), key=lambda e: e.name):
        if entry_point.module != __name__:
            module = importlib.import_module(entry_point.module)
            if hasattr(module, "headlines"):
                found[entry_point.name] = (entry_point, module)
    return found


def _headlines(report: dict[str, Any]) -> Iterator[Headline]:
    _, module = _benchmarks()[report["benchmark"]]
    yield from module.headlines(report)


def _run(folder: Path, *, quick: bool) -> list[str]:
    """Run one benchmark after the other, each in a process of its own; the names that failed."""
    failed = []
    benchmarks = _benchmarks()
    for number, (name, (_, module)) in enumerate(benchmarks.items(), 1):
        options: Sequence[str] = module.QUICK if quick else ()
        say(f"{number} of {len(benchmarks)}: cmt bench {shlex.join([name, *options])}", err=True)
        begun = time.monotonic()
        command = [*CMT, "bench", name, *options, "--json", str(folder / f"{name}.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed.append(name)
            said = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
            say(f"{name} failed: {said[-1]}", err=True)
        else:
            say(f"  {time.monotonic() - begun:.0f} s", err=True)
    return failed


def _print(found: Sequence[dict[str, Any]]) -> None:
    """The table of reports: median and, in parentheses, the least and the most of the rounds."""
    table = Table("", "ours", "against", "theirs", "times as fast")
    for report in found:
        for row in _headlines(report):
            table.add_row(row.what, row.ours, row.rival, row.theirs, row.times)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _write_into(document: Path, table: str) -> None:
    """Replace what stands between the two marks. Raises OutputError where they are missing."""
    text = document.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise OutputError(f"{document} has no lines {BEGIN} and {END} to write between")
    write_whole(document, f"{before}{BEGIN}\n{table}{END}{after}")


def _spread(spread: dict[str, float], factor: float = 1.0) -> str:
    median, least, most = (_figure(spread[key] * factor) for key in ("median", "least", "most"))
    return f"{median} ({least}–{most})"


def _figure(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
