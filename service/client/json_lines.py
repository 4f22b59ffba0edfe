"""Manifests as JSON Lines: an object per line, with the columns of a CSV manifest as its names."""

from __future__ import annotations

import json
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from model.csv_table import Table, leave_out
from model.strict_json import read_json


def is_json_lines(path: Path) -> bool:
    """Whether a file begins with an object. Raises OSError."""
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def read_json_lines(path: Path, known: Collection[str]) -> Table:
    """The objects of a file with their values as the cells of a CSV file, and what is wrong.

    known: the names that they may have. Raises OSError.
    """
    table = Table()
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        table.problems.append("it is no UTF-8; save it in UTF-8")
        return table
    for line, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        try:
            content = read_json(written)
        except ValueError as error:
            table.problems.append(f"line {line} is no JSON: {error}")
            continue
        if not isinstance(content, dict):
            table.problems.append(f'line {line} is no object, such as {{"file": "a.jpg"}}')
            continue
        unknown = [name for name in content if name not in known]
        for name in unknown:
            near = get_close_matches(name, known, 1)
            hint = f"is it {near[0]!r}?" if near else f"the names are {', '.join(known)};"
            table.problems.append(
                f"line {line}: the name {name!r} is unknown; {hint} {leave_out(name)}"
            )
        if not unknown:
            cells = {name: _cell(value) for name, value in content.items()}
            table.rows.append((line, {"file": "", **cells}))
    return table


def _cell(value: Any) -> str:
    """A value as a cell of a CSV file."""
    if isinstance(value, list):
        return ",".join(map(_cell, value))
    if isinstance(value, dict | bool):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)
