"""CSV files as spreadsheets, scripts and people write them.

UTF-8 with or without a byte order mark; cells divided by commas, semicolons or tabs, which the
header decides; spaces after a delimiter are layout, and names of columns are trimmed and may be in
any case.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

_DELIMITERS = (",", ";", "\t")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass
class Table:
    """rows: the line where each begins, and its cells by column. problems: in sentences."""

    rows: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_table(path: Path, needed: Collection[str], known: Collection[str] | None = None) -> Table:
    """The rows of a CSV file that has a header, and all that is wrong with them.

    needed: columns that it must have. known: all that it may have; None: any.
    Raises OSError.
    """
    data = path.read_bytes()
    if data.startswith(_UTF_16) or b"\0" in data:
        return Table(problems=["it is UTF-16 or no text; save it as CSV in UTF-8"])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return Table(problems=[f"line {line} is no UTF-8; save it as CSV in UTF-8"])
    headers = {mark: _header(text, mark) for mark in _DELIMITERS}
    wanted = set(needed) | set(known or ())
    delimiter = max(headers, key=lambda mark: len(wanted.intersection(headers[mark])))
    table = Table(problems=list(_header_problems(headers[delimiter], needed, known)))
    if not table.problems:
        _fill(table, text, delimiter)
    return table


def leave_out(column: str) -> str:
    """How to enroll in spite of a column that is not known."""
    return f"to leave it out, give --ignore-column {shlex.quote(column)}"


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Records that are not empty, each with the line where it begins. Raises csv.Error."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    line = 1
    try:
        for cells in reader:
            if any(cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"line {line}: {error}; a quote may be missing") from error


def _header(text: str, delimiter: str) -> list[str]:
    """Names of the columns if that is the delimiter, else others or none."""
    try:
        _, cells = next(_records(text, delimiter), (0, []))
    except csv.Error:
        return []
    return [cell.strip().casefold() for cell in cells]


def _header_problems(
    names: list[str], needed: Collection[str], known: Collection[str] | None
) -> Iterator[str]:
    columns = ", ".join(needed if known is None else known)
    for name in dict.fromkeys(name for name in names if name):
        if names.count(name) > 1:
            yield f"the column {name!r} is there {names.count(name)} times; keep one"
        if known is not None and name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"is it {near[0]!r}?" if near else f"the columns are {columns};"
            yield f"the column {name!r} is unknown; {hint} {leave_out(name)}"
    for name in needed:
        if name not in names:
            yield f"there is no column {name!r}; it needs the columns {columns} in its first line"


def _fill(table: Table, text: str, delimiter: str) -> None:
    """Add rows and problems of all lines after the header."""
    try:
        records = _records(text, delimiter)
        _, header = next(records)
        names = [name.strip().casefold() for name in header]
        for line, cells in records:
            surplus = cells[len(names) :]  # empty cells: a spreadsheet's trailing delimiters
            if len(cells) < len(names) or any(surplus):
                table.problems.append(
                    f"line {line} has {len(cells)} cells, the first line {len(names)}; quote a "
                    "cell that holds the delimiter"
                )
                continue
            if any(cell for name, cell in zip(names, cells, strict=False) if not name):
                table.problems.append(f"line {line} has a cell in a column without a name")
            table.rows.append((line, dict(zip(names, cells, strict=False))))
    except csv.Error as error:
        table.problems.append(str(error))
