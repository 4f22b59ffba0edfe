"""What a file is called in the gallery: labels from options and from its path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated
from zoneinfo import ZoneInfo

import typer
from pydantic import ValidationError

from service.api.schemas import BatchItem
from service.client.bulk import what_is_wrong
from service.client.patterns import PathPattern
from service.client.stream import Entry

PatternOption = Annotated[
    str | None,
    typer.Option(
        help="Where a file's labels stand in its path below the folder, such as "
        "'{camera}/{person}/*.jpg' or '{camera}_{time:%Y%m%d%H%M}*'; ** is any number of folders."
    ),
]
TimezoneOption = Annotated[
    str | None,
    typer.Option(
        metavar="ZONE", help="Of times in paths that say no offset: UTC, Europe/Berlin, …"
    ),
]
FileTime = Annotated[
    bool,
    typer.Option("--file-time", help="A file without another time was captured when it was saved."),
]


class LabelsInvalid(ValueError):  # noqa: N818 (as the errors of the client)
    """Labels that are none, in a sentence; `labels` is what stands in the path."""

    def __init__(self, sentence: str, labels: Mapping[str, object]) -> None:
        super().__init__(sentence)
        self.labels = labels


@dataclass(frozen=True)
class Naming:
    """Labels of files. defaults: of all; the pattern's win over them."""

    defaults: BatchItem
    pattern: PathPattern | None = None
    file_time: bool = False

    def entry(self, file: Path, below: str) -> Entry | None:
        """A file with its labels; None where the pattern leaves it out.

        below: its path below the folder that was named, with slashes. Raises LabelsInvalid, and
        OSError where the time of the file is needed and cannot be had.
        """
        labels = self.defaults.model_dump(exclude_unset=True)
        if self.pattern is not None:
            texts = self.pattern.match(below)
            if texts is None:
                return None
            labels |= self.pattern.labels(texts)
            try:
                captured_at = self.pattern.time(texts)
            except ValueError as error:
                written = " ".join(self.pattern.time_texts(texts))
                raise LabelsInvalid(str(error), {**labels, "captured_at": written}) from None
            if captured_at is not None:
                labels["captured_at"] = captured_at
        if self.file_time and "captured_at" not in labels:
            labels["captured_at"] = datetime.fromtimestamp(int(file.stat().st_mtime), UTC)
        try:
            return Entry(file, BatchItem.model_validate(labels))
        except ValidationError as error:
            raise LabelsInvalid("; ".join(what_is_wrong(error)), labels) from None


def naming(
    pattern: str | None, timezone: str | None, *, file_time: bool, **labels: str | None
) -> Naming:
    """The labels that options say; those that are None are not given.

    Raises PatternError, ValidationError and typer.BadParameter.
    """
    given = {name: label for name, label in labels.items() if label is not None}
    defaults = BatchItem.model_validate(given)
    zone = None if timezone is None else _zone(timezone)
    return Naming(defaults, None if pattern is None else PathPattern(pattern, zone), file_time)


def below(file: Path, folders: list[Path]) -> tuple[Path, str] | None:
    """The innermost of the named folders that a file lies in, and its path below that."""
    holding = [folder for folder in folders if file.is_relative_to(folder)]
    if not holding:
        return None
    folder = max(holding, key=lambda one: len(one.parts))
    return folder, file.relative_to(folder).as_posix()


def _zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError):
        raise typer.BadParameter(
            f"{name!r} is no time zone; write one such as UTC or Europe/Berlin"
        ) from None
