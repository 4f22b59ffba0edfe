"""What others wrote is shown and never obeyed."""

from __future__ import annotations

import ast
import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from model.terminal import Console, printable, say, say_json, say_lines
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Zoë 北京 नमस्ते 👩\u200d🔬", "Zoë 北京 नमस्ते 👩\u200d🔬"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\x9b31m", r"\x9b31m"),  # an escape sequence of one character
        ("a\r\nError: b", r"a\r\nError: b"),
        ("invoice\u202efdp.exe", r"invoice\u202efdp.exe"),
        ("a\u2028b\u200b\ufeff\U000e0041", r"a\u2028b\u200b\ufeff\U000e0041"),
        (os.fsdecode(b"J\xfcrgen\x80.jpg"), r"J\xfcrgen\x80.jpg"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_does_not_print_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_no_text_leaves_its_line(text: str) -> None:
    shown = printable(text)
    assert all(character.isprintable() or character in "\u200c\u200d" for character in shown)
    assert len(shown.splitlines()) <= 1
    shown.encode()


def test_lines_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb", err=True)
    say_lines("a\nb\x1b")
    said = capsys.readouterr()
    assert (said.err, said.out) == ("a\\nb\n", "a\nb\\x1b\n")
    value = {"name": "Zoë\x9b31m\u202e\U000e0041\x7f", "more": [1, "\n"]}
    say_json(json.dumps(value, ensure_ascii=False, indent=1))
    out = capsys.readouterr().out
    assert json.loads(out) == value
    assert "Zoë" in out
    assert all(character.isprintable() or character == "\n" for character in out)


def printed(width: int, *things: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system="standard")
    for thing in things:
        if isinstance(thing, Table):
            console.print_table(thing)
        else:
            console.print(thing, soft_wrap=True)
    return file.getvalue()


def test_a_console_reads_no_markup_of_others() -> None:
    hostile = "[bold red]x[/] :smile: [link=http://a]y\x1b]0;title\x07[/nothing]"
    table = Table("[i]head", title="\x1b[1m[b]title", box=None)
    table.add_row(hostile)
    out = printed(200, hostile, table, Text("ours", "red"))
    assert out.count("[bold red]x[/] :smile: [link=http://a]y\\x1b]0;title\\x07[/nothing]") == 2
    assert "[i]head" in out
    assert "\\x1b[1m[b]title" in out
    assert "\x07" not in out
    assert "\x1b[31mours" in out  # a style of ours is one


def test_a_narrow_terminal_loses_no_column() -> None:
    table = Table("id", "person", "camera", box=None)
    table.columns[0].no_wrap = True
    table.add_row("0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10", "anna", "gate")
    out = printed(30, table)
    for cell in ("0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10", "anna", "gate"):
        assert cell in out


def test_every_command_prints_through_this_module() -> None:
    """Another way to a terminal would show what others wrote as it is."""
    found = []
    for package in ("model", "service", "training"):
        for file in (ROOT / package).rglob("*.py"):
            if file == ROOT / "model" / "terminal.py":
                continue
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.ImportFrom):
                    names = {alias.name for alias in node.names}
                    wrong = names & {"Console", "print", "echo", "from_markup"}
                    if wrong and node.module != "model.terminal":
                        found.append((file, node.lineno, str(wrong)))
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    if called in ("print", "typer.echo", "typer.secho", "Text.from_markup"):
                        found.append((file, node.lineno, called))
    assert not found
