"""Tables that are shown in a terminal and written as Markdown from the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from model.terminal import Console, printable


@dataclass(frozen=True)
class Grid:
    """A table as text.

    title: what it shows.
    header: names of the columns; the first holds names, the others figures.
    rows: cells; a row of one cell is a heading within the table.
    notes: sentences that stand below it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=tuple)


def show(console: Console, grids: Sequence[Grid]) -> None:
    """Print all tables, each with its notes; deviations below their means, to fit 80 columns."""
    for grid in grids:
        table = Table(title=grid.title, title_justify="left", box=SIMPLE_HEAD)
        for number, name in enumerate(grid.header):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in grid.rows:
            style = "italic" if len(row) == 1 else None
            cells = (Text(printable(cell).replace(" ± ", "\n± ")) for cell in row)
            table.add_row(*cells, style=style)
        console.print(table)
        for note in grid.notes:
            console.print(note)
        console.print()


def markdown(title: str, facts: Sequence[str], grids: Sequence[Grid]) -> str:
    """All tables under one heading, after `facts`: what they are of, one paragraph each."""
    blocks = [f"# {title}", *facts]
    for grid in grids:
        lines = [_line(grid.header), "|".join(["", "---", *["---:"] * (len(grid.header) - 1), ""])]
        for row in grid.rows:
            cells = [f"*{row[0]}*", *[""] * (len(grid.header) - 1)] if len(row) == 1 else row
            lines.append(_line(cells))
        blocks += [f"## {grid.title}", "\n".join(lines), *grid.notes]
    return "\n\n".join(blocks) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
