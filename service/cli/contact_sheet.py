"""A contact sheet: queries and their answers as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from service.api.schemas import QueryAnswer, Result
from service.cli.answers import headline, part_bars, percent, verdict
from service.client import Client


@dataclass(frozen=True)
class SheetImage:
    """An image to show."""

    data: bytes
    media_type: str

    @property
    def uri(self) -> str:
        """The image itself, as the `src` of an element."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Match:
    """One result.

    bars: see `part_bars`. right: whether it shows the person searched for, None where that is not
    known.
    """

    result: Result
    picture: SheetImage
    bars: list[float]
    right: bool | None


@dataclass(frozen=True)
class Row:
    """One query with its results. note: a line below the query."""

    title: str
    note: str
    pictures: list[SheetImage]
    answer: QueryAnswer
    matches: list[Match]


def matches(
    client: Client, answer: QueryAnswer, show: int, person_id: str | None = None
) -> list[Match]:
    """The first `show` results of `answer` with their crops.

    person_id: the person searched for, if known.
    """
    return [
        Match(
            result,
            SheetImage(*client.image(result.item.id)),
            bars,
            None if person_id is None else result.item.person_id == person_id,
        )
        for result, bars in zip(answer.results[:show], part_bars(answer.results), strict=False)
    ]


def render(title: str, lines: Sequence[str], rows: Sequence[Row]) -> str:
    """The page. lines: what stands below its title."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # most commands draw no sheet

    environment = Environment(
        loader=PackageLoader("service", "web"), autoescape=True, undefined=StrictUndefined
    )
    environment.globals |= {"headline": headline, "percent": percent, "verdict": verdict}
    template = environment.get_template("contact_sheet.html")
    return template.render(title=title, lines=lines, rows=rows)
