"""JSON that somebody else wrote, read without surprises.

Python's own reader goes as deep as its stack, takes NaN for a number, and of two equal names the
last one: what it returns can fail much later, far from the file.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from pydantic_core import from_json


def read_json(text: str) -> Any:
    """The content of a JSON text.

    Raises ValueError, in words for people, for what is no JSON, nests deeper than 200, has a name
    twice in an object, or holds a number that is not finite or of thousands of digits, or text that
    is no Unicode.
    """
    from_json(text, allow_inf_nan=False)  # limits depth, digits and text
    return json.loads(
        text, object_pairs_hook=_without_repeats, parse_float=_finite, parse_constant=_refused
    )


def refuse_repeats(text: str | bytes) -> None:
    """Raises ValueError, in words for people, where an object of a JSON text has a name twice.

    Readers take the first or the last of the two. text: UTF-8; what is no JSON is left to its
    reader.
    """
    try:
        from_json(text, allow_inf_nan=False)
    except ValueError:
        return
    json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!r} is there twice")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not finite")
    return number


def _refused(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")
