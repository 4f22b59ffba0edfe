"""16- and 32-bit pixels → 8 bits, by one stated policy.

Infrared cameras deliver 10, 12 or 14 bits in 16-bit containers, and thermal ones a narrow band
somewhere in the range. Taking the high byte would make the first nearly black and the second flat;
clipping at 255 would destroy both. The policy, on all channels together so that hues stay:

1. Integers that are not negative and fit 16 bits: b is the smallest of 8, 10, 12, 14, 16 bits that
   holds all but the brightest 0.1 % of the values (hot pixels), and [0, 2^b − 1] maps linearly to
   [0, 255]. A 12-bit picture in a 16-bit file thus equals its 8-bit version.
2. Where the values (the inner 99.8 %) span less than an eighth of that range, and for negative,
   larger or floating-point values, [0.1 %, 99.9 %] of what is there maps to [0, 255].
"""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

_TIFF_PHOTOMETRIC, _TIFF_BITS, _WHITE_IS_ZERO = 262, 258, 0
_BITS = (8, 10, 12, 14, 16)
_NARROW = 8  # a span of less than 1/8 of the range is stretched
# Pillow reduces 16-bit colour to the high byte; read in the other byte order, it gives the low one.
_OTHER_BYTE_ORDER = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B" if sys.byteorder == "little" else "RGB;16L",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBA;16N": "RGBA;16B" if sys.byteorder == "little" else "RGBA;16L",
}


def bit_depth(image: Image.Image) -> int:
    """Bits per channel of an opened, not yet loaded image: 1, 8, 12, 16 or 32."""
    if image.mode == "1":
        return 1
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode in ("I", "F", "I;16"):
        bits = image.tag_v2.get(_TIFF_BITS, (16,))
        return int(bits[0] if isinstance(bits, tuple) else bits)
    if image.mode.startswith("I;16") or ";16" in _raw_mode(image):
        return 16
    return 32 if image.mode in ("I", "F") else 8


def is_wide_gray(image: Image.Image) -> bool:
    """Whether a loaded image holds one channel of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def narrow_gray(image: Image.Image) -> Image.Image:
    """A loaded one-channel image of over 8 bits → mode L.

    Raises ValueError where a value is not finite.
    """
    values = np.asarray(image)
    values = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
    if (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.mode.startswith("I;16")
        and image.tag_v2.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO
    ):
        values = 65535 - values  # Pillow inverts 8-bit pictures of this kind, not 16-bit ones
    return Image.fromarray(to_8_bit(values))


def low_byte_reader(image: Image.Image) -> bool:
    """Make an opened, not yet loaded 16-bit colour image load its low bytes → whether it can."""
    other = _OTHER_BYTE_ORDER.get(_raw_mode(image))
    if other is None:
        return False
    file = cast(Any, image)
    file.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:]))
        for tile in file.tile
    ]
    return True


def narrow_colour(high: Image.Image, low: Image.Image) -> Image.Image:
    """The high and the low bytes of a 16-bit colour image (RGB or RGBA) → 8 bits per channel."""
    wide = np.asarray(high).astype(np.int64) * 256 + np.asarray(low)
    narrow = to_8_bit(wide[..., :3])
    if high.mode == "RGBA":
        narrow = np.concatenate([narrow, np.asarray(high)[..., 3:]], axis=2)
    return Image.fromarray(narrow)


def to_8_bit(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The policy above: integers or floats of any shape → uint8.

    Raises ValueError where a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("the image holds values that are not finite")
    low, high = (float(p) for p in np.percentile(values, (0.1, 99.9)))
    floor, ceiling = low, high
    if values.dtype.kind != "f" and values.min() >= 0 and values.max() < 1 << 16:
        bits = next(b for b in _BITS if high < 1 << b)
        if (high - low) * _NARROW >= 1 << bits:
            floor, ceiling = 0.0, float((1 << bits) - 1)
    scaled = (values - floor) * (255.0 / max(ceiling - floor, np.finfo(np.float64).tiny))
    return np.asarray(scaled.clip(0, 255).round(), dtype=np.uint8)


def _raw_mode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None) or []
    args = tiles[0].args if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args or "")
