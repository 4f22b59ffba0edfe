"""Bytes → a checked, oriented 8-bit crop, with its modality.

Pillow only, restricted to five formats. Every size is read from the header and checked before a
pixel is decoded; whatever a codec raises becomes an error of the client (4xx), never of the
service. Truncated files are refused, never filled up.

Modality `auto` calls an image infrared when it has no chroma: the picture is averaged over 4×4
pixel blocks (chroma noise of sensors and codecs cancels there, colours of clothes do not), and the
99th percentile over the blocks of max(R, G, B) − min(R, G, B) may not exceed
`CHROMA_TOLERANCE` levels of 255. See `has_chroma` for what was measured.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

from model.pictures import Polarity
from service.errors import (
    BoxOutside,
    ImageEmpty,
    ImageMultiFrame,
    ImageTooLarge,
    ImageTooSmall,
    ImageTruncated,
    ImageTypeUnsupported,
    ImageUndecodable,
)
from service.images.bit_depth import (
    bit_depth,
    is_wide_gray,
    low_byte_reader,
    narrow_colour,
    narrow_gray,
)

Modality = Literal["rgb", "ir"]
ModalityChoice = Literal["auto", "rgb", "ir"]
ModalitySource = Literal["given", "detected"]
T = TypeVar("T")

CHROMA_TOLERANCE = 6
_BLOCK = 4
_BACKGROUND = 128  # under transparent pixels: gray, so that no chroma and no hard edge is added

_MEDIA_TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323

# EXIF orientation → what brings the picture upright (TIFF 6.0, tag 274).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Box(NamedTuple):
    """A part of a frame in pixels, after orientation."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Picture:
    """Uploaded bytes and how to read them. polarity: matters for an infrared picture only."""

    data: bytes
    modality: ModalityChoice = "auto"
    box: Box | None = None
    polarity: Polarity = "white_hot"

    @cached_property
    def sha256(self) -> str:
        """Of the bytes, as hexadecimal digits. Computed once, in the thread that asks first."""
        return hashlib.sha256(self.data).hexdigest()


class ImageLimits(NamedTuple):
    """What an upload may be; pixels count before a box is cut out."""

    max_bytes: int = 20_000_000
    max_pixels: int = 20_000_000
    min_width: int = 16
    min_height: int = 32


# Of a crop that is stored already: the limits may have changed since.
STORED_LIMITS = ImageLimits(max_bytes=1 << 40, max_pixels=1 << 40)


@dataclass(frozen=True)
class Crop:
    """A person crop, ready for `model.preprocess`.

    image: mode RGB, 8 bits, upright, the box cut out; from `Decoders` at the network's input size.
    width, height: of the crop that is stored. bit_depth: of the upload. sha256: of the
    uploaded bytes. data: what is stored, the upload itself or a lossless PNG of the box, neither
    inverted. polarity: of infrared, which `image` no longer has; None of a visible crop.
    """

    image: Image.Image
    modality: Modality
    modality_source: ModalitySource
    width: int
    height: int
    bit_depth: int
    sha256: str
    data: bytes
    media_type: str
    polarity: Polarity | None = None


def decode(
    data: bytes,
    *,
    modality: ModalityChoice = "auto",
    box: Box | None = None,
    polarity: Polarity = "white_hot",
    limits: ImageLimits | None = None,
    sha256: str | None = None,
) -> Crop:
    """Decode one upload. Raises a ServiceError of status 413, 415 or 422, one sentence each.

    polarity: of the picture if it is infrared: `black_hot` is inverted, after it was stored.
    sha256: of `data`, where the caller has it already.
    """
    limits = limits or ImageLimits()
    if not data:
        raise ImageEmpty("the image has 0 bytes; send the file's content")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"the image has {len(data):,} bytes, the limit is {limits.max_bytes:,}; "
            "send a smaller crop"
        )
    kind = _kind(data)
    image = _guarded(lambda: _open(data, kind))
    _check_header(image, box, limits)
    depth = _guarded(lambda: bit_depth(image))
    picture = _guarded(lambda: _load(image, data, kind, depth))
    media_type = _MEDIA_TYPES[kind]
    stored = data
    if box is not None:
        picture = _cut(picture, box)
        stored, media_type = _png(picture), _MEDIA_TYPES["PNG"]
    _check_small(picture.width, picture.height, limits)
    detected: Modality = "rgb" if has_chroma(picture) else "ir"
    taken: Modality = detected if modality == "auto" else modality
    if taken == "ir" and polarity == "black_hot":
        picture = ImageOps.invert(picture)
    return Crop(
        image=picture,
        modality=taken,
        modality_source="detected" if modality == "auto" else "given",
        width=picture.width,
        height=picture.height,
        bit_depth=depth,
        sha256=sha256 or hashlib.sha256(data).hexdigest(),
        data=stored,
        media_type=media_type,
        polarity=polarity if taken == "ir" else None,
    )


def has_chroma(image: Image.Image) -> bool:
    """Whether an RGB image shows colour beyond the noise of sensor and codec.

    Measured on the rendered SYSU-layout set, whose visible cameras include dull ones: of its 5,384
    visible crops none was taken for infrared (the dullest two lie at 6.1 and 8), of its 3,191
    infrared crops none for visible. 500 crops of each kind saved again at JPEG quality 30, 50, 75
    and 95 with 4:4:4 and 4:2:0 chroma and at WebP quality 30 and 75, after independent Gaussian
    noise of 0, 1, 2 or 4 levels on each channel: visible 0 errors in all; infrared 0 up to 2
    levels of noise, and at 4 levels at most 14 of 500 (JPEG 50, 4:4:4), 0 with 4:2:0 or WebP. An
    infrared camera with a colour cast, or a gray photograph, needs its modality given.
    """
    blocks = np.asarray(image.reduce(_BLOCK), dtype=np.int16)
    chroma = blocks.max(axis=2) - blocks.min(axis=2)
    return bool(np.percentile(chroma, 99) > CHROMA_TOLERANCE)


def _kind(data: bytes) -> str:
    """The format by its first bytes; the client's file name and media type are not trusted."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"BM"):
        return "BMP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    raise ImageTypeUnsupported("the image is no JPEG, PNG, WebP, BMP or TIFF; convert it to one")


def _open(data: bytes, kind: str) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=[kind])


def _guarded(step: Callable[[], T]) -> T:
    """Run a step of a codec; whatever it raises is the upload's fault."""
    try:
        return step()
    except Image.DecompressionBombError as error:
        raise ImageTooLarge("the image has too many pixels; send a smaller crop") from error
    except Exception as error:
        if "truncated" in str(error).lower():
            raise ImageTruncated("the image ends too early; send the whole file") from error
        raise ImageUndecodable(
            "the image cannot be decoded: it is damaged or of a variant that is not supported; "
            "save it again as JPEG or PNG"
        ) from error


def _check_header(image: Image.Image, box: Box | None, limits: ImageLimits) -> None:
    """Refuse by size and frames, before pixels are decoded."""
    sizes = [image.width * image.height]
    tags = getattr(image, "tag_v2", {})  # libtiff allocates whole tiles
    sizes.append(_number(tags.get(_TIFF_TILE_WIDTH)) * _number(tags.get(_TIFF_TILE_LENGTH)))
    if max(sizes) > limits.max_pixels:
        raise ImageTooLarge(
            f"the image has {max(sizes):,} pixels, the limit is {limits.max_pixels:,}; "
            "send a smaller crop"
        )
    # A JPEG of several pictures (MPO, phones) has a main one; pages and animations have not.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ImageMultiFrame("the image has several frames or pages; send one of them")
    if box is None and max(image.size) < limits.min_height:
        _check_small(*image.size, limits)


def _load(image: Image.Image, data: bytes, kind: str, depth: int) -> Image.Image:
    """Decode → upright, mode RGB, 8 bits."""
    wide_colour = depth == 16 and image.mode in ("RGB", "RGBA")
    image.load()
    picture = image
    if is_wide_gray(image):
        picture = narrow_gray(image)
    elif wide_colour:
        low = _open(data, kind)
        if low_byte_reader(low):
            low.load()
            picture = narrow_colour(image, low)
    upright = _UPRIGHT.get(_orientation(image))
    if picture.mode == "LAB":
        raise ValueError("no conversion from LAB")
    picture = _opaque(picture)
    return picture if upright is None else picture.transpose(upright)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none or it is unreadable (Pillow turns TIFF itself)."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _opaque(image: Image.Image) -> Image.Image:
    """Any 8-bit mode → RGB, transparent parts on gray."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, (_BACKGROUND, _BACKGROUND, _BACKGROUND, 255))
    return Image.alpha_composite(ground, layer).convert("RGB")


def _cut(image: Image.Image, box: Box) -> Image.Image:
    inside = (
        box.x >= 0
        and box.y >= 0
        and box.width > 0
        and box.height > 0
        and box.x + box.width <= image.width
        and box.y + box.height <= image.height
    )
    if not inside:
        raise BoxOutside(
            f"the box {','.join(map(str, box))} is not wholly inside the image of "
            f"{image.width}×{image.height} pixels; give x,y,width,height after EXIF rotation"
        )
    return image.crop((box.x, box.y, box.x + box.width, box.y + box.height))


def _check_small(width: int, height: int, limits: ImageLimits) -> None:
    if width < limits.min_width or height < limits.min_height:
        raise ImageTooSmall(
            f"the crop has {width}×{height} pixels, at least "
            f"{limits.min_width}×{limits.min_height} are needed; send a larger one"
        )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
