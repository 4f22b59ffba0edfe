"""Bytes → a checked crop that can be embedded and stored.

`model.pictures` reads them, as it does for training; what it refuses becomes an error of the client
(4xx), never of the service. Here is added what a gallery keeps of a picture.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from PIL import Image

from model.modalities import Modality
from model.pictures import (
    Box,
    Format,
    ImageLimits,
    ModalityChoice,
    PictureError,
    Polarity,
    read,
)
from model.pixels import Pixels
from service.errors import error_of
from service.images.containers import plain

__all__ = [
    "STORED_LIMITS",
    "Box",
    "Crop",
    "ImageLimits",
    "Modality",
    "ModalityChoice",
    "ModalitySource",
    "Picture",
    "Polarity",
    "decode",
]

ModalitySource = Literal["given", "camera", "detected"]

MEDIA_TYPES: dict[Format, str] = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}

# Of a crop that is stored already: what is refused may have changed since.
STORED_LIMITS = ImageLimits(max_bytes=1 << 40, max_pixels=1 << 40, judged=False)


@dataclass(frozen=True)
class Picture:
    """Uploaded bytes and how to read them. polarity: matters for an infrared picture only.

    by_camera: the modality is what holds for the camera, the sender gave none.
    """

    data: bytes
    modality: ModalityChoice = "auto"
    box: Box | None = None
    polarity: Polarity = "white_hot"
    by_camera: bool = False

    @cached_property
    def sha256(self) -> str:
        """Of the bytes, as hexadecimal digits. Computed once, in the thread that asks first."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Crop:
    """A person crop, ready for `model.preprocess`.

    image: mode RGB, 8 bits, upright, the box cut out, infrared in three equal channels; from
    `Decoders` at the network's input size, as an array H×W×3. width, height: of the crop that is
    stored. bit_depth: of the upload. sha256: of the uploaded bytes. data: what is stored, the
    upload itself or a lossless PNG of the box, its colours as they came. polarity: of infrared,
    which `image` no longer has; None of a visible crop. seconds: of computing that decoding took
    its process.
    """

    image: Pixels
    modality: Modality
    modality_source: ModalitySource
    width: int
    height: int
    bit_depth: int
    sha256: str
    data: bytes
    media_type: str
    polarity: Polarity | None = None
    seconds: float = 0.0


def decode(
    data: bytes,
    *,
    modality: ModalityChoice = "auto",
    box: Box | None = None,
    polarity: Polarity = "white_hot",
    limits: ImageLimits | None = None,
    keep_metadata: bool = False,
    sha256: str | None = None,
) -> Crop:
    """Decode one upload. Raises a ServiceError of status 413, 415 or 422, one sentence each.

    polarity: of the picture if it is infrared: `black_hot` is inverted, after it was stored.
    keep_metadata: whether EXIF and the like are stored. sha256: of `data`, where the caller has it
    already.
    """
    limits = limits or ImageLimits()
    shown = data
    if limits.judged and len(data) <= limits.max_bytes:
        shown = plain(data, limits.max_pixels)
    try:
        reading = read(shown, modality=modality, polarity=polarity, box=box, limits=limits)
    except PictureError as error:
        raise error_of(error.kind, str(error)) from error
    return Crop(
        image=reading.image,
        modality=reading.modality,
        modality_source="detected" if reading.detected else "given",
        width=reading.upright.width,
        height=reading.upright.height,
        bit_depth=reading.bit_depth,
        sha256=sha256 or hashlib.sha256(data).hexdigest(),
        data=(data if keep_metadata else shown) if box is None else _png(reading.upright),
        media_type=MEDIA_TYPES[reading.format if box is None else "PNG"],
        polarity=reading.polarity,
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
