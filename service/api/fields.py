"""Types of values that clients send as text: labels, times, boxes, metadata."""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema
from pydantic_core import from_json

from model.labels import MAX_LABEL, normalized_label
from model.strict_json import refuse_repeats
from service.gallery.metadata import METADATA_BYTES, check_metadata

_RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)
_NO_TIME = "is no time that exists between the years 1 and 9999"
_BOX = re.compile(r"\d{1,6},\d{1,6},\d{1,6},\d{1,6}", re.ASCII)


def plain_text(value: str) -> str:
    """Return `value` if every database and JSON reader takes it.

    Raises ValueError for control characters (NUL among them) and half of a surrogate pair.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError("must not hold control characters")
    return value


def names_once(value: Any) -> Any:
    """Return `value` unless it is JSON text with a name twice in an object: which one counts?

    Raises ValueError.
    """
    if isinstance(value, str | bytes):
        try:
            refuse_repeats(value)
        except ValueError as error:
            raise ValueError(f"must have each name once in an object, and {error}") from error
    return value


def _timestamp(value: Any) -> Any:
    """RFC 3339 text → an aware datetime in UTC."""
    if isinstance(value, datetime):  # given by Python code, not by a client
        return value
    if not isinstance(value, str) or not _RFC_3339.fullmatch(value):
        raise ValueError("must be a time with an offset, such as 2026-03-01T14:05:00+01:00")
    leap = value[17:19] == "60"  # which Python does not know
    text = f"{value[:17]}59{value[19:]}" if leap else value
    try:
        time = datetime.fromisoformat(text.upper()).astimezone(UTC)
        if not leap:
            return time
        if (time.hour, time.minute) == (23, 59):  # the only minute of a day that may have one
            return time + timedelta(seconds=1)
    except (ValueError, OverflowError) as error:
        raise ValueError(_NO_TIME) from error
    raise ValueError(_NO_TIME)


def _not_before_from(value: datetime | None, info: ValidationInfo) -> datetime | None:
    start = info.data.get("captured_from")
    if value is not None and start is not None and value < start:
        raise ValueError("must not be before captured_from")
    return value


def _box(value: Any) -> Any:
    """'x,y,width,height' → four whole numbers."""
    if not isinstance(value, str):
        return value
    if not _BOX.fullmatch(value):
        raise ValueError("must be x,y,width,height in whole pixels, such as 12,0,64,128")
    return tuple(map(int, value.split(",")))


def _metadata(value: Any) -> Any:
    """JSON text, or a value parsed from it → an object that every database and reader takes."""
    if isinstance(value, str):
        value = _parsed(value)
    check_metadata(value)
    return value


def _parsed(text: str) -> Any:
    try:
        encoded = text.encode()
        if len(encoded) > METADATA_BYTES:
            raise ValueError(f"must be at most {METADATA_BYTES} bytes of JSON")
        return from_json(names_once(encoded), allow_inf_nan=False)
    except ValueError as error:
        if str(error).startswith("must be"):
            raise
        raise ValueError('must be a JSON object, such as {"note": "gate 3"}') from error


# What OpenAPI can say of `model.labels`: the length is that of normalization form C.
_LABEL: dict[str, Any] = {
    "maxLength": MAX_LABEL,
    "pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$",
}
Label = Annotated[str, Field(json_schema_extra=_LABEL), AfterValidator(normalized_label)]
# Of a filter: `Gallery.label` judges it, because items of an older release may have it.
AnyLabel = Annotated[str, Field(json_schema_extra=_LABEL)]
# For JSON bodies; in a form an empty field counts as not given anyway.
OptionalLabel = Annotated[
    Label | None, BeforeValidator(lambda value: None if value == "" else value)
]
Timestamp = Annotated[
    datetime,
    BeforeValidator(_timestamp),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
# The end of a time range, in a model that has `captured_from` before it.
CapturedTo = Annotated[Timestamp | None, AfterValidator(_not_before_from)]
Box = Annotated[
    tuple[int, int, int, int],
    BeforeValidator(_box),
    WithJsonSchema({"type": "string", "pattern": r"^(\d{1,6}(,\d{1,6}){3})?$"}),
]
Metadata = Annotated[
    dict[str, Any],
    BeforeValidator(_metadata),
    WithJsonSchema({"type": "string", "maxLength": METADATA_BYTES}),
]
MetadataObject = Annotated[
    dict[str, Any],
    BeforeValidator(_metadata),
    WithJsonSchema({"type": "object", "description": f"At most {METADATA_BYTES} bytes of JSON."}),
]
