"""Answers of queries in plain words and small bars, for the terminal and the contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from service.api.schemas import QueryAnswer, Result
from service.kit.text import counted

_BLOCKS = "▁▂▃▄▅▆▇█"
_VERDICTS = {
    "likely": "Likely found",
    "possible": "Possible",
    "none": "Probably not enrolled",
}
NO_FIT = (
    "No probabilities: the checkpoint has no fit for this search; "
    "`cmt calibrate` makes one (docs/calibration.md)."
)


def verdict(answer: QueryAnswer) -> str | None:
    """What the answer says in a word or three; None where there are no probabilities."""
    return None if answer.match is None else _VERDICTS[answer.match]


def headline(answer: QueryAnswer) -> str:
    """One line that says whether the person was found, and how certain that is."""
    said, enrolled = verdict(answer), answer.probability_enrolled
    if said is None or enrolled is None:
        return NO_FIT
    if not answer.searched:
        return f"{said}: nothing was searched."
    among = f"Among the {counted(answer.people, 'person', 'people')} searched at all"
    if answer.people == 1:
        among = "That it is the only person searched"
    whole = f"{among}: {percent(enrolled)}."
    first = answer.results[0] if answer.results else None
    if first is None or answer.match == "none":
        return f"{said}. {whole}"
    name = first.item.person_id
    who = "the first, without a label" if name is None else f"person {name}"
    return f"{said}: {who} ({percent(first.probability)}). {whole}"


def percent(probability: float | None) -> str:
    """A probability for people to read, who would take 100% for certain."""
    if probability is None:
        return "-"
    if probability in (0, 1):
        return f"{probability:.0%}"
    if probability < 0.01:
        return "<1%"
    return ">99%" if probability > 0.99 else f"{probability:.0%}"


def part_bars(results: Sequence[Result]) -> list[list[float]]:
    """A number from 0 to 1 for every part of every result, from head to feet: how well it agrees.

    The calibrated `agreement`. Where the checkpoint has none for a result: exp(−d²/m), m the mean
    of the squared part distances d² of all results. That is 1 for a part that equals the query's
    and e⁻¹ = 0.37 for one as far from it as these results are on average. Empty lists where the
    answer has no parts (not explained, or a cosine checkpoint).
    """
    distances = [distance for result in results for distance in result.parts or []]
    mean = sum(distances) / len(distances) if any(distances) else 1.0
    return [
        result.agreement or [math.exp(-distance / mean) for distance in result.parts or []]
        for result in results
    ]


def sparkline(values: Sequence[float]) -> str:
    """Numbers from 0 to 1 as blocks of that height."""
    return "".join(_BLOCKS[round(value * (len(_BLOCKS) - 1))] for value in values)
