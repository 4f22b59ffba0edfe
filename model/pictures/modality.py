"""Whether a picture is visible or infrared."""

from __future__ import annotations

import numpy as np
from PIL import Image

CHROMA_TOLERANCE = 6
_BLOCK = 4


def has_chroma(image: Image.Image) -> bool:
    """Whether an RGB image shows colour beyond the noise of sensor and codec."""
    blocks = np.asarray(image.reduce(_BLOCK), dtype=np.int16)
    chroma = blocks.max(axis=2) - blocks.min(axis=2)
    return bool(np.percentile(chroma, 99) > CHROMA_TOLERANCE)


def as_infrared(image: Image.Image) -> Image.Image:
    """An RGB image of an infrared camera → its brightness, as three equal channels."""
    return image.convert("L").convert("RGB")
