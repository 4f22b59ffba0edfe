"""What clients may store beside an item: a JSON object that every database and reader takes."""

from __future__ import annotations

import json
import math
from typing import Any

from service.kit.text import is_utf_8

METADATA_BYTES = 8192
METADATA_DEPTH = 16


def check_metadata(value: Any) -> None:
    """Raises ValueError, whose message continues a sentence about the value."""
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object, not another JSON value")
    if not _is_portable(value, METADATA_DEPTH):
        raise ValueError(
            f"must nest at most {METADATA_DEPTH} deep, without NUL characters and with numbers of "
            "at most 64 bits"
        )
    if len(_compact(value)) > METADATA_BYTES:
        raise ValueError(f"must be at most {METADATA_BYTES} bytes of JSON")


def _compact(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace")


def _is_portable(value: Any, depth: int) -> bool:
    if depth < 0:
        return False
    if isinstance(value, dict):
        return all(_is_portable(k, 0) and _is_portable(v, depth - 1) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_portable(element, depth - 1) for element in value)
    if isinstance(value, str):
        return "\0" not in value and is_utf_8(value)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or -(2**63) <= value < 2**63
