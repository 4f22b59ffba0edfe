"""Whether a picture shows anything: not the black, or the noise, of a covered or dead camera.

A picture is averaged over cells, in which the noise of single pixels cancels and a person does not.
No crop of 2,259 renderings is blank, as it is or at a fifth of its brightness, at its own size, at
64×128, 32×64 or 16×32; the least spread of their cells is 3 levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.pictures.quantiles import quantiles
from model.pictures.value_range import without_borders

_ENOUGH = 256  # pixels across: more would only take longer
_CELLS = (8, 16)  # width, height, so that a cell has 64 pixels or more
_LEAST = 2.2  # levels of 255 between the 10th and the 90th percentile of the cells
_FAINT = 16.0  # levels of deviation up to which 8-bit noise counts as none: above it is a texture
# Times the variance that noise alone leaves in the cells' means, for each pixel of a cell: what is
# seen adds to it with their number. A cell of few pixels tells nothing.
_STRUCTURE, _MOST_STRUCTURE, _FEW = 0.25, 25.0, 8
_DEVIATIONS = 2.56  # between those percentiles of a normal distribution
_FLAT = 4  # levels by which codecs change a border


def is_blank(image: Image.Image) -> bool:
    """Whether an RGB image shows one shade, or no more than faint noise on it."""
    if (factor := min(image.size) // _ENOUGH) > 1:
        image = image.reduce(factor)
    gray = np.asarray(image.convert("L"), dtype=np.float32)
    inner, _ = without_borders(gray, np.ones(gray.shape, bool), apart=_FLAT, share=0.25)
    if _spread(inner) < _LEAST:
        return True
    return bool(inner.std() < _FAINT) and is_noise(inner)


def is_noise(values: npt.NDArray[Any]) -> bool:
    """Whether H×W values vary from pixel to pixel only, as sensors do without light."""
    values = values.astype(np.float32)
    steps = np.diff(values, axis=1)
    noise = float((steps * steps).mean()) / 2
    per_cell = values.size / (_CELLS[0] * _CELLS[1])
    if per_cell < _FEW:
        return False
    structure = min(_MOST_STRUCTURE, _STRUCTURE * per_cell)
    return (_spread(values) / _DEVIATIONS) ** 2 * per_cell < structure * noise


def _spread(values: npt.NDArray[Any]) -> float:
    cells = np.asarray(Image.fromarray(values).resize(_CELLS, Image.Resampling.BOX))
    low, high = quantiles(cells, 0.1, 0.9)
    return high - low
