"""A contact sheet: queries and their answers as one self-contained HTML page."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from service.api.schemas import QueryAnswer, Result
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

    similarities: of its parts, from head to feet. right: whether it shows the person searched for,
    None where that is not known.
    """

    result: Result
    picture: SheetImage
    similarities: list[float]
    right: bool | None


@dataclass(frozen=True)
class Row:
    """One query with its results. note: a line below the query."""

    title: str
    note: str
    pictures: list[SheetImage]
    answer: QueryAnswer
    matches: list[Match]


def part_similarities(results: Sequence[Result]) -> list[list[float]]:
    """exp(−d²/m) for every part of every result, m the mean of the squared part distances d².

    1 is a part that equals the query's; e⁻¹ = 0.37 one as far from it as these results are on
    average. Empty lists where the answer has no parts (not explained, or a cosine checkpoint).
    """
    parts = [result.parts or [] for result in results]
    distances = [distance for row in parts for distance in row]
    mean = sum(distances) / len(distances) if any(distances) else 1.0
    return [[math.exp(-distance / mean) for distance in row] for row in parts]


def matches(
    client: Client, answer: QueryAnswer, show: int, person_id: str | None = None
) -> list[Match]:
    """The first `show` results of `answer` with their crops.

    person_id: the person searched for, if known. Similarities are relative to all results of the
    answer.
    """
    similarities = part_similarities(answer.results)
    return [
        Match(
            result,
            SheetImage(*client.image(result.item.id)),
            similarity,
            None if person_id is None else result.item.person_id == person_id,
        )
        for result, similarity in zip(answer.results[:show], similarities, strict=False)
    ]


def render(title: str, lines: Sequence[str], rows: Sequence[Row]) -> str:
    """The page. lines: what stands below its title."""
    environment = Environment(
        loader=PackageLoader("service", "web"), autoescape=True, undefined=StrictUndefined
    )
    template = environment.get_template("contact_sheet.html")
    return template.render(title=title, lines=lines, rows=rows)
