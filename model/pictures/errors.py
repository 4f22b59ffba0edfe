"""Why image bytes are no picture of a person."""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "box_outside",
    "image_blank",
    "image_empty",
    "image_multi_frame",
    "image_too_large",
    "image_too_small",
    "image_truncated",
    "image_type_unsupported",
    "image_undecodable",
]


class PictureError(ValueError):
    """Bytes that are refused: a stable kind, what is wrong, and what a sender can do about it."""

    def __init__(self, kind: Kind, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.kind = kind
        self.reason = reason


def truncated() -> PictureError:
    """The error of a file whose pixels are not all there."""
    return PictureError(
        "image_truncated", "the image is truncated: it ends too early", "send the whole file"
    )
