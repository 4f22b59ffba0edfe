"""The report of what was not enrolled, which can be given back as a manifest."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from model.atomic_file import PRIVATE, write_whole
from service.cli.outputs import output
from service.client import EntryResult
from service.client.bulk import COLUMNS, WHY

UNREADABLE, LABELS = "file_unreadable", "labels_invalid"
"""Codes of what never reached the service; all others are those of its errors."""
REPORTED = (*COLUMNS, *WHY)
_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Failure:
    """A file that was not enrolled, and why. labels: as they were sent, or as they are written."""

    file: Path
    code: str
    reason: str
    labels: Mapping[str, Any] = field(default_factory=dict)


def failure_of(result: EntryResult, file: Path) -> Failure:
    """What a result without an item says of a file."""
    reason, code = result.reason or "no reason was given", result.code or UNREADABLE
    return Failure(file, code, reason, result.entry.item.model_dump(exclude_unset=True))


def write_report(path: Path, failures: Sequence[Failure]) -> None:
    """Replace a report: CSV, or JSON Lines where its name says so. Raises OSError."""
    rows = [_values(failure) for failure in failures]
    if path.suffix.lower() in _JSON_LINES:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        table = io.StringIO()
        writer = csv.DictWriter(
            table, REPORTED, restval="", lineterminator="\n", quoting=csv.QUOTE_ALL
        )
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        text = table.getvalue()
    write_whole(path, text.encode(errors="backslashreplace"), PRIVATE)


def report_place(path: Path | None, *, force: bool) -> Path | None:
    """Where a report that is asked for may be written, an earlier one's place or, by force, any.

    Raises as `output`.
    """
    if path is None:
        return None
    return output(path, force=force or _is_report(path), special=True)


def _is_report(path: Path) -> bool:
    """Whether a file is an earlier report, which may be replaced unasked."""
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with path.open(encoding="utf-8", newline="") as file:
            line = file.readline()
            if path.suffix.lower() in _JSON_LINES:
                return set(WHY) < set(json.loads(line or "{}"))
            return next(csv.reader([line]), []) == list(REPORTED)
    except (OSError, ValueError, csv.Error):
        return False


def _values(failure: Failure) -> dict[str, Any]:
    """What a report says of a file, without what is empty."""
    labels = to_jsonable_python(failure.labels)
    given = {name: value for name, value in labels.items() if value not in (None, {})}
    file = str(failure.file.absolute())
    return {"file": file, **given, "code": failure.code, "reason": failure.reason}


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
