"""Which values of a wide picture are the scene's, and which must not set its range.

Left out are borders (lines along the edges that hold one value, as letterboxes and drawn frames
do), telemetry (lines along the edges far outside of what the middle holds), and values that stand
for "none": up to four at either end, each exactly one number, further from the rest than the rest
is wide (0, −9999, −32768, 65535, −1e38, whatever the camera chose). All of them would flatten the
person, who spans some hundred of the thousands of levels between them and the scene.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

_MOST = 512  # lines and columns that are looked at: what sets a range does not need more
_BORDERS = 3  # one inside the other
_EDGE = 8  # lines that lie in the outer 1/8 may be telemetry
_FOREIGN = 0.3  # of a line's pixels lie outside of what the middle holds
_MARKERS = 4  # values that stand for none, at either end
_DISTINCT = 8  # a scene has at least so many values, and a tenth of the pixels
_SHARE = 0.1
_OUTLIERS = 0.001  # hot and dead pixels


def values_of_the_scene(values: Values, valid: Mask | None = None) -> Values:
    """H×W or H×W×C → the values, flat, that set the range; empty where none is valid.

    Without the 0.1 % at either end, which are hot and dead pixels.
    """
    step = max(1, -(-max(values.shape[:2]) // _MOST))
    values = values[::step, ::step]
    if values.dtype.kind == "u":  # differences of these would wrap
        values = values.astype(np.int64)
    mask = np.ones(values.shape, bool) if valid is None else valid[::step, ::step]
    for _ in range(_BORDERS):
        values, mask = without_borders(values, mask)
    values, mask = _without_telemetry(values, mask)
    found = values[mask]
    low, high = _limits(found)
    return found[(found >= low) & (found <= high)]


def without_borders(
    values: Values, mask: Mask, *, apart: int = 0, share: float = 1.0
) -> tuple[Values, Mask]:
    """Cut off lines along the four edges that hold one value, or none that is valid.

    mask: where values are valid. apart: what still counts as one value. share: of the lines, that a
    border may have at most. What is nothing but borders is left as it is.
    """
    inner, inner_mask = values, mask
    for turn in range(4):
        side, side_mask = _turned(inner, turn), _turned(inner_mask, turn)
        cut = min(_lines_alike(side, side_mask, apart), int(share * len(side)))
        if cut >= len(side) - 1:
            return values, mask
        inner, inner_mask = _turned(side[cut:], -turn), _turned(side_mask[cut:], -turn)
    return inner, inner_mask


def _turned(values: Values, turns: int) -> Values:
    """`numpy.rot90`, without what that takes to check its arguments."""
    if turns & 1:
        values = values.swapaxes(0, 1)[::-1]
    return values[::-1, ::-1] if turns & 2 else values


def _lines_alike(values: Values, mask: Mask, apart: int) -> int:
    """How many of the first lines hold one value, or none that is valid."""
    first, checked, step = values[:1, :1], 0, 1
    while checked < len(values):  # most pictures have no border: the first line tells
        lines = slice(checked, checked + step)
        alike = (np.abs(values[lines] - first) <= apart) | ~mask[lines]
        same = alike.all(axis=tuple(range(1, values.ndim)))
        if not same.all():
            return checked + int(same.argmin())
        checked, step = checked + len(same), 2 * step
    return checked


def _without_telemetry(values: Values, mask: Mask) -> tuple[Values, Mask]:
    """Cut off lines along the four edges that are unlike the middle."""
    height, width = (n // _EDGE for n in values.shape[:2])
    middle = (slice(height, values.shape[0] - height), slice(width, values.shape[1] - width))
    low, high = _limits(values[middle][mask[middle]])
    margin = (high - low) / 2
    foreign = mask & ((values < low - margin) | (values > high + margin))
    for turn in range(4):
        side = _turned(foreign, turn)
        share = side[: len(side) // _EDGE].mean(axis=tuple(range(1, side.ndim)))
        far = np.flatnonzero(share > _FOREIGN)
        cut = int(far[-1]) + 1 if far.size else 0
        foreign, values, mask = (
            _turned(_turned(a, turn)[cut:], -turn) for a in (foreign, values, mask)
        )
    return values, mask


def _limits(found: Values) -> tuple[float, float]:
    """Least and largest value of the scene: without outliers, and without what stands for none."""
    if not found.size:
        return 0.0, 0.0
    levels, counts = np.unique(found, return_counts=True)
    below = np.cumsum(counts)
    kept = (below > _OUTLIERS * found.size) & (below - counts < (1 - _OUTLIERS) * found.size)
    levels, below = levels[kept].astype(np.float64), below[kept]
    best = (0, len(levels))
    for start in range(min(_MARKERS + 1, len(levels))):
        for end in range(len(levels), max(len(levels) - _MARKERS - 1, start + _DISTINCT - 1), -1):
            span = levels[end - 1] - levels[start]
            pixels = below[end - 1] - (below[start - 1] if start else 0)
            apart = (start == 0 or levels[start] - levels[start - 1] > span) and (
                end == len(levels) or levels[end] - levels[end - 1] > span
            )
            fewer = end - start < best[1] - best[0]
            if apart and fewer and pixels >= _SHARE * found.size:
                best = (start, end)
    low, high = float(levels[best[0]]), float(levels[best[1] - 1])
    if best != (0, len(levels)):  # the outliers of the scene itself are still there
        return _limits(found[(found >= low) & (found <= high)])
    return low, high
