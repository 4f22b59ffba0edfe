"""What an image file says of itself in its first bytes: no pixel is decoded."""

from __future__ import annotations

import warnings
from typing import BinaryIO, NamedTuple

from PIL import Image

from service.images.containers import webp
from service.images.decode import MEDIA_TYPES

_WEBP_BYTES = 30  # up to the size of the picture


class Header(NamedTuple):
    """Sizes are those of the file, which its orientation may swap."""

    media_type: str
    width: int
    height: int


def read_header(file: BinaryIO) -> Header:
    """Raises ValueError for what is no image, or one of another format than those enrolled."""
    start = file.read(_WEBP_BYTES)
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":  # Pillow would begin to decode it
        return Header("image/webp", *webp.size(start[12:16], start[20:]))
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, and of odd metadata
            image = Image.open(file, formats=[name for name in MEDIA_TYPES if name != "WEBP"])
    except Exception as error:  # whatever a parser raises is the file's fault
        raise ValueError("this is no image") from error
    kind = "JPEG" if image.format == "MPO" else image.format
    return Header(MEDIA_TYPES[kind], *image.size)  # type: ignore[index]
