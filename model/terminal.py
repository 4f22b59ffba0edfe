"""What commands print: nothing that somebody else wrote can command the terminal.

Names of files, labels, and what a service answers may hold escape sequences, line ends, marks that
turn the direction of writing, or Rich's markup. Commands print with `say`, `say_json` and
`Console` only, which show such characters as Python writes them (`\\x1b`).
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import rich.console
import typer
from rich.table import Table
from rich.text import Text

_JOINERS = "\u200c\u200d"  # zero width, but part of words in some scripts
_WIDTH = 80  # that tables are made for


def printable(text: object) -> str:
    """A text as one line of a terminal: what does not print is escaped.

    Bytes of a file's name that are no UTF-8 are shown as bytes.
    """
    return "".join(_shown(character) or _escaped(character) for character in str(text))


def say(text: object, *, err: bool = False) -> None:
    """Print a line. err: on standard error."""
    typer.echo(printable(text), err=err)


def say_lines(text: str, *, err: bool = False) -> None:
    """Print a text of several lines. err: on standard error."""
    for line in text.split("\n"):
        say(line, err=err)


def say_json(text: str) -> None:
    """Print JSON of the same meaning: what does not print there becomes an escape of JSON."""
    encoding = sys.stdout.encoding or "utf-8"

    def shown(found: re.Match[str]) -> str:
        try:
            found[0].encode(encoding)
        except UnicodeEncodeError:
            return json.dumps(found[0])[1:-1]
        return _shown(found[0]) or json.dumps(found[0])[1:-1]

    typer.echo(re.sub(r"[^\n -~]", shown, text))


class Console(rich.console.Console):
    """Rich's console for what others wrote: a `str` is text and no markup; `Text` has styles."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"highlight": False, **settings})

    def print_table(self, table: Table) -> None:
        """Print a table. On a narrow terminal its lines run on; no column is left out."""
        self.print(_Wide(table), crop=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        """As Rich does with a `str` that is printed or in a table, but without reading markup."""
        return super().render_str(printable(text), **{**settings, "markup": False, "emoji": False})


class _Wide:
    """A table that a narrow terminal does not squeeze; Rich prints nothing wider than itself."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        yield from console.render(self._table, options.update(width=max(options.max_width, _WIDTH)))


def _shown(character: str) -> str:
    return character if character.isprintable() or character in _JOINERS else ""


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python reads a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
