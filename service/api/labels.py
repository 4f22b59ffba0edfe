"""Labels of filters and erasures, which an item of an older release may have in any form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastapi.exceptions import RequestValidationError

from model.labels import LabelError
from service.gallery import Gallery
from service.resources import Resources

_FIELDS: dict[str, Literal["person_id", "camera_id"]] = {
    "person_id": "person_id",
    "camera_id": "camera_id",
    "exclude_camera_id": "camera_id",
}


async def meant(
    state: Resources, where: Literal["body", "query"], **given: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The labels that texts of these fields mean: see `Gallery.label`.

    Raises RequestValidationError for a text that is no label, unless an item has it.
    """

    def look_up() -> dict[str, tuple[str, ...]]:
        return {
            field: tuple(_label(state.gallery, where, field, text) for text in texts)
            for field, texts in given.items()
        }

    return await state.pipeline.stored(look_up) if any(given.values()) else dict.fromkeys(given, ())


def _label(gallery: Gallery, where: str, field: str, text: str) -> str:
    try:
        return gallery.label(_FIELDS[field], text)
    except LabelError as error:
        raise RequestValidationError(
            [{"type": "value_error", "loc": (where, field), "msg": str(error)}]
        ) from error
