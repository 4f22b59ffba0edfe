"""Samples that are not unsigned bytes → 8 bits, by one stated policy.

Infrared cameras deliver 10, 12 or 14 bits in 16-bit containers, and thermal ones a narrow band
somewhere in the range. Taking the high byte would make the first nearly black and the second flat;
clipping at 255 would destroy both. The policy, on all channels together so that hues stay:

1. Integers that are not negative and fit 16 bits: b is the smallest of 8, 10, 12, 14, 16 bits that
   holds all but the brightest 0.1 % of the values (hot pixels), and [0, 2^b − 1] maps linearly to
   [0, 255]. A 12-bit picture in a 16-bit file thus equals its 8-bit version.
2. Where the values (the inner 99.8 %) span less than an eighth of that range, and for negative,
   larger or floating-point values, [0.1 %, 99.9 %] of what is there maps to [0, 255]; not where
   that is noise only, which becomes black.

"The values" are those of the scene: `value_range` says what is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from model.pictures.content import is_noise
from model.pictures.value_range import values_of_the_scene, without_borders

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT, _TIFF_NO_DATA = 258, 262, 339, 42113
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
_BITS = (8, 10, 12, 14, 16)
_NARROW = 8  # a span of less than 1/8 of the range is stretched
_GRAY_ALPHA = "LA;16B"
# Pillow reduces 16-bit colour to the high byte; read in the other byte order, it gives the low one.
_OTHER_BYTE_ORDER = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B" if sys.byteorder == "little" else "RGB;16L",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBA;16N": "RGBA;16B" if sys.byteorder == "little" else "RGBA;16L",
}

Layout = Literal["bytes", "gray", "gray and alpha", "colour"]


@dataclass(frozen=True)
class Samples:
    """What the header of an opened, not yet loaded image says of its samples.

    depth: bits per channel, 1, 8, 12, 16 or 32. layout: `bytes` where Pillow's 8 bits are right as
    they are, else what has to be narrowed. signed: whether they count from below zero; None where
    Pillow knows. no_data: the value that stands for none.
    """

    depth: int
    layout: Layout
    signed: bool | None = None
    white_is_zero: bool = False
    no_data: float | None = None


def samples_of(image: Image.Image) -> Samples:
    """Read the header of an opened, not yet loaded image."""
    raw = _raw_mode(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "1":
        return Samples(1, "bytes")
    if raw == _GRAY_ALPHA:
        return Samples(16, "gray and alpha")
    if raw in _OTHER_BYTE_ORDER:
        return Samples(16, "colour")
    form = _first(tags.get(_TIFF_SAMPLE_FORMAT, _UNSIGNED))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        known = 16 if image.mode.startswith("I;16") else 32
        return Samples(
            depth=_first(tags.get(_TIFF_BITS, known)),
            layout="gray",
            signed=None if image.mode != "I" or not tags else form == _SIGNED,
            white_is_zero=tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO,
            no_data=_number(tags.get(_TIFF_NO_DATA)),
        )
    if image.mode == "L" and form == _SIGNED:
        return Samples(8, "gray", signed=True)
    return Samples(16 if ";16" in raw else 8, "bytes")


def read_all_bits(image: Image.Image) -> None:
    """Make an opened, not yet loaded 16-bit gray image with alpha load both bytes of both.

    As two samples of two bytes lie in the file, so do the four of mode RGBA: red is then the high
    byte of gray, green the low one, blue the high byte of alpha.
    """
    _replace_raw_mode(image, "RGBA")


def read_low_bytes(image: Image.Image) -> None:
    """Make an opened, not yet loaded 16-bit colour image load its low bytes."""
    _replace_raw_mode(image, _OTHER_BYTE_ORDER[_raw_mode(image)])


def narrowed(planes: Sequence[Image.Image], samples: Samples) -> Image.Image:
    """Loaded images of any layout → one of 8 bits per channel, with alpha where there is any.

    planes: one image, or those of the high and of the low bytes of 16-bit colour.
    """
    first = planes[0]
    if samples.layout == "bytes":
        return first
    if samples.layout == "gray":
        return _narrow_gray(first, samples)
    high = np.asarray(first)
    alpha: npt.NDArray[np.uint8] | None = None
    if samples.layout == "gray and alpha":
        values, alpha = _wide(high[..., 0], high[..., 1]), high[..., 2]
    else:
        values = _wide(high[..., :3], np.asarray(planes[1])[..., :3])
        if first.mode == "RGBA":
            alpha = high[..., 3]
    if alpha is None or alpha.min() == alpha.max():
        return Image.fromarray(to_8_bit(values))
    valid = np.broadcast_to(
        (alpha > 0).reshape(*alpha.shape, *[1] * (values.ndim - 2)), values.shape
    )
    picture = Image.fromarray(to_8_bit(values, valid)).convert("RGBA")
    picture.putalpha(Image.fromarray(alpha))
    return picture


def _wide(high: npt.NDArray[np.uint8], low: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    values: npt.NDArray[np.uint16] = np.left_shift(high, 8, dtype=np.uint16)
    return np.bitwise_or(values, low, dtype=np.uint16)


def _narrow_gray(image: Image.Image, samples: Samples) -> Image.Image:
    values = np.asarray(image)
    if samples.signed is not None and values.dtype.kind != "f":
        size = values.dtype.itemsize  # Pillow reads int8 as uint8, and uint32 as int32
        values = values.view(f"{'i' if samples.signed else 'u'}{size}")
    if values.dtype != np.uint16:
        values = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
    valid = np.isfinite(values)
    if samples.no_data is not None:
        valid &= values != samples.no_data
    if samples.white_is_zero:  # Pillow inverts 8-bit pictures of this kind, not wider ones
        values = (65535 if image.mode.startswith("I;16") else 0) - values
    return Image.fromarray(to_8_bit(values, valid))


def to_8_bit(
    values: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.uint8]:
    """The policy above: integers or floats, H×W or H×W×3 → uint8.

    valid: of the same shape, where there is a value at all; elsewhere the result is 0.
    """
    scene = values_of_the_scene(values, valid)
    if not scene.size:
        return np.zeros(values.shape, np.uint8)
    low, high = float(scene.min()), float(scene.max())
    floor, ceiling = low, high
    if values.dtype.kind != "f" and low >= 0 and high < 1 << 16:
        bits = next(b for b in _BITS if high < 1 << b)
        if (high - low) * _NARROW >= 1 << bits:
            floor, ceiling = 0.0, float((1 << bits) - 1)
    if (floor, ceiling) == (low, high) and values.ndim == 2:
        inner, _ = without_borders(
            values.astype(np.float64).clip(low, high), np.ones(values.shape, bool)
        )
        if is_noise(inner):
            return np.zeros(values.shape, np.uint8)
    if values.dtype == np.uint16:  # most of all pictures: each of the few values is scaled once
        table = _scaled(np.arange(1 << 16), floor, ceiling)
        result: npt.NDArray[np.uint8] = table[values]
        if valid is not None:
            result[~valid] = 0
        return result
    return _scaled(values if valid is None else np.where(valid, values, floor), floor, ceiling)


def _scaled(values: npt.NDArray[Any], floor: float, ceiling: float) -> npt.NDArray[np.uint8]:
    scaled = (values - floor) * (255.0 / max(ceiling - floor, np.finfo(np.float64).tiny))
    return np.asarray(scaled.clip(0, 255).round(), dtype=np.uint8)


def _raw_mode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None) or []
    args = tiles[0].args if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _replace_raw_mode(image: Image.Image, raw: str) -> None:
    file = cast(Any, image)
    file.tile = [
        tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
        for tile in file.tile
    ]


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)


def _number(text: object) -> float | None:
    """GDAL's tag holds the number as text."""
    try:
        return float(str(text).rstrip("\0 ")) if text is not None else None
    except ValueError:
        return None
