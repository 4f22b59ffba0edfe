"""Whether a picture is visible or infrared, and infrared in one channel however it is colored.

Infrared cameras deliver one channel. What they color it with is one of three things, each of which
leaves fewer degrees of freedom than clothes do:

- a tint: the hue depends on the brightness alone, and linearly (an IR-cut filter that is stuck, an
  offset of the chroma, sepia, a green phosphor). `_one_hue`;
- something drawn along the edges, on a picture that has one hue without them (a detector's box, its
  label, a line of text). `_one_hue` of what is inside;
- a palette: strong colors on one curve through the cube of colors. `_Curve`.

How well that tells them from visible pictures: `scripts/modality_table.py`, with its table in
`docs/gallery.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.pictures.quantiles import quantiles

Array = npt.NDArray[Any]

# A picture without chroma: levels of 255 between channels, at the 99th percentile of the blocks.
_NEUTRAL = 6.0
_LEAST_STEP = 5  # what is lossless now may have been a frame of a video
_WEBP_STEP = 12  # as of a middling quality: the file does not say it plainly
# A block is averaged: noise of sensor and codec cancels there, colors of clothes do not.
_BLOCK, _BLOCKS_ACROSS = 4, 12


class _Tolerance(NamedTuple):
    """How many levels blocks of one hue may lie off it, at a quantile of the blocks.

    least: always. step: for each level of the step in which the codec rounds chroma. tint: for each
    level of the tint.
    """

    quantile: float
    least: float
    step: float
    tint: float


_HUE = (_Tolerance(0.90, 3.0, 0.2, 0.04), _Tolerance(0.99, 4.5, 0.3, 0.06))
# What is drawn colors its neighbourhood in a JPEG, so more is allowed beside it.
_HUE_INSIDE = (_Tolerance(0.90, 4.0, 0.25, 0.04), _Tolerance(0.99, 6.0, 0.35, 0.06))
_FAINT = 6.0  # levels of chroma without a direction of their own
_EDGE = 6  # what is drawn lies in the outer 1/6 of width and height
_DRAWN = 60.0  # levels of chroma that a drawn line has somewhere
# A palette: a chroma in three quarters of the picture that clothes have in few, on a bent curve of
# many small steps that nine tenths of the colors are near to: much nearer than to gray, or, of many
# hues, nearer than to one hue.
_VIVID, _VERY_VIVID, _STEP = 28.0, 70.0, 20.0
_NEARER_THAN_GRAY, _NEARER_THAN_ONE_HUE = 6.0, 0.6
_BENT, _MANY_HUES, _FAR_HUES = 20.0, 18.0, 100.0
_TINTED = 40.0  # levels of chroma from which on the brightest channel is nearer to the sensor's
_ACROSS = 48  # pixels that a curve is sought in
_ENOUGH = 1000  # of them tell how near it is


def is_visible(image: Image.Image, step: int = 0) -> bool:
    """Whether an RGB image shows the colors of things, and not those of an infrared camera.

    step: levels to which its codec rounded chroma, as far as that is known.
    """
    if quantiles(_chroma(_fine(image, _BLOCK)), 0.99)[0] <= _NEUTRAL:
        return False
    step = max(step, _LEAST_STEP)
    factor = max(_BLOCK, min(image.size) // _BLOCKS_ACROSS)
    blocks = np.asarray(image.reduce(factor))
    if _one_hue(blocks, step, _HUE):
        return False
    height, width = (max(1, n // _EDGE) for n in blocks.shape[:2])
    inner = blocks[height:-height, width:-width]
    pixels = _fine(image)
    chroma = _chroma(pixels)
    if inner.size and chroma.max() >= _DRAWN and _one_hue(inner, step, _HUE_INSIDE):
        return False
    return not _is_palette(pixels, chroma)


def chroma_step(image: Image.Image) -> int:
    """Levels to which the codec of an opened image rounded chroma, averaged over a block."""
    tables = getattr(image, "quantization", None)  # of a JPEG
    if tables:
        return max(int(table[0]) for table in tables.values())
    return _WEBP_STEP if image.format == "WEBP" else 0


def as_infrared(image: Image.Image) -> Image.Image:
    """An RGB image of an infrared camera → what its sensor saw, as three equal channels.

    A palette is followed from its dark, cold end to its bright, warm one.
    """
    red, green, blue = image.split()
    if red.tobytes() == green.tobytes() == blue.tobytes():
        return image
    pixels = np.asarray(image)
    chroma = _chroma(pixels)
    fine = _fine(image)
    if _is_palette(fine, _chroma(fine)):
        gray = Image.fromarray(_Curve.through(fine).along(pixels))
    elif quantiles(chroma, 0.5)[0] > _TINTED:
        gray = Image.fromarray(pixels.max(axis=2))
    else:
        gray = image.convert("L")
    return gray.convert("RGB")


def _fine(image: Image.Image, least: int = 1) -> Array:
    """The image in blocks of few pixels, in bytes."""
    factor = max(least, min(image.size) // _ACROSS)
    return np.asarray(image if factor == 1 else image.reduce(factor))  # by 1 it would be copied


def _chroma(pixels: Array) -> Array:
    """Levels between the largest and the smallest of the channels."""
    red, green, blue = np.ascontiguousarray(pixels.transpose(2, 0, 1))  # faster, with the copy
    most = np.maximum(np.maximum(red, green), blue)
    return np.asarray(most - np.minimum(np.minimum(red, green), blue))


def _one_hue(blocks: Array, step: int, tolerances: Sequence[_Tolerance]) -> bool:
    """Whether the chroma of blocks is a linear function of their brightness, of one direction."""
    off, ends = _off_one_hue(blocks, share=0.7)  # so that what is drawn does not count
    [tint] = quantiles(_chroma(blocks), 0.5)
    levels = quantiles(off, *(of.quantile for of in tolerances))
    if any(
        level > of.least + of.step * step + of.tint * tint
        for level, of in zip(levels, tolerances, strict=True)
    ):
        return False
    faint = bool((np.linalg.norm(ends, axis=1) < _FAINT).any())
    return faint or float(ends[0] @ ends[1]) > 0


def _off_one_hue(colors: Array, share: float) -> tuple[Array, Array]:
    """Levels by which colors lie off the hue that fits best to `share` of them.

    Also returns the chroma (R − Y and B − Y) of that hue in the dark and in the bright.
    """
    luma, red, blue = _luma_and_chroma(colors)
    of_red, of_blue = ((0.0, quantiles(chroma, 0.5)[0]) for chroma in (red, blue))
    kept: Array | None = None
    for _ in range(4):
        off = np.maximum(np.abs(_beside(red, luma, of_red)), np.abs(_beside(blue, luma, of_blue)))
        before, kept = kept, off <= quantiles(off, share)[0]
        if before is not None and (before == kept).all():
            break  # the same colors give the same fit
        of_red, of_blue = _fitted(luma[kept], red[kept], blue[kept])
    red, blue = _beside(red, luma, of_red), _beside(blue, luma, of_blue)
    green = -(0.299 * red + 0.114 * blue) / 0.587
    most = np.maximum(np.maximum(red, green), np.maximum(blue, 0))
    least = np.minimum(np.minimum(red, green), np.minimum(blue, 0))
    ends = [
        [slope * brightness + offset for slope, offset in (of_red, of_blue)]
        for brightness in quantiles(luma, 0.02, 0.98)
    ]
    return most - least, np.array(ends)


def _beside(chroma: Array, luma: Array, line: tuple[float, float]) -> Array:
    """What is left of N chromas without slope · luma + offset."""
    slope, offset = line
    return np.asarray(chroma - (slope * luma + offset))


def _fitted(luma: Array, *chromas: Array) -> list[tuple[float, float]]:
    """The least squares of N chromas = slope · luma + offset, of each of `chromas`."""
    mean = _mean(luma)
    deviation = luma - mean
    square = max(float(deviation @ deviation), 1e-9)
    slopes = [float(deviation @ chroma) / square for chroma in chromas]
    means = [_mean(chroma) for chroma in chromas]
    return [(slope, of - mean * slope) for slope, of in zip(slopes, means, strict=True)]


def _mean(values: Array) -> float:
    """`ndarray.mean`, which takes three times as long for the few numbers of a picture."""
    return float(np.add.reduce(values)) / len(values)


def _luma_and_chroma(colors: Array) -> tuple[Array, Array, Array]:
    """…×3 colors → N lumas Y, N of R − Y and N of B − Y."""
    red, green, blue = colors.reshape(-1, 3).T.astype(np.float64, order="C")
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return luma, red - luma, blue - luma


def _is_palette(pixels: Array, chroma: Array) -> bool:
    """Whether an image in fine blocks, of this chroma, is colored by a palette."""
    if np.count_nonzero(chroma < _VIVID) > chroma.size // 4 + 1:
        return False  # as the quantile would say, which takes ten times as long
    [vivid] = quantiles(chroma, 0.25)
    if vivid < _VIVID:
        return False
    half, far = quantiles(_off_one_hue(pixels, share=1.0)[0], 0.5, 0.99)
    if far < _BENT:
        return False
    curve = _Curve.through(pixels)
    if curve.step > _STEP:  # a few flat colors
        return False
    colors = pixels.reshape(-1, 3).astype(np.float64)
    distances, _ = curve.project(colors[:: max(1, len(colors) // _ENOUGH)])
    near = 1 + quantiles(distances, 0.9)[0]
    if vivid >= max(_VERY_VIVID, _NEARER_THAN_GRAY * near):
        return True
    return bool(half >= max(_MANY_HUES, _NEARER_THAN_ONE_HUE * near) and far >= _FAR_HUES)


@dataclass(frozen=True)
class _Curve:
    """A line through the colors of a picture: N×3 corners, from cold to hot."""

    corners: Array

    _STEP = 12  # levels of 255 in which colors are counted
    _MOST = 160  # colors that a line is laid through

    @classmethod
    def through(cls, pixels: Array) -> _Curve:
        """The longest way along the shortest tree that joins the most frequent colors."""
        colors = pixels.reshape(-1, 3).astype(np.float64)
        _, place, counts = np.unique(
            (colors // cls._STEP) @ (4096, 64, 1), return_inverse=True, return_counts=True
        )
        sums = [np.bincount(place, channel) for channel in colors.T]
        means = np.stack(sums, axis=1) / counts[:, None]
        frequent = np.argsort(-counts, kind="stable")[: cls._MOST]
        frequent = frequent[counts[frequent] >= min(3, counts.max())]
        corners = _longest_way(means[frequent])
        # Hot is bright and warm: of the two ends, that with more red and green than blue.
        towards = corners @ (1.0, 0.6, -0.4)
        if np.arange(len(corners)) @ (towards - towards.mean()) < 0:
            corners = corners[::-1]
        return cls(corners)

    @property
    def step(self) -> float:
        """Median length of its steps, in levels."""
        if len(self.corners) < 2:
            return float("inf")
        return float(np.median(np.linalg.norm(np.diff(self.corners, axis=0), axis=1)))

    def project(self, colors: Array) -> tuple[Array, Array]:
        """N×3 colors → their distances from the line, and how far along it they lie, in [0, 1]."""
        corners = np.concatenate([self.corners[:-1:2], self.corners[-1:]])  # enough, and faster
        steps = np.diff(corners, axis=0)
        lengths = np.linalg.norm(steps, axis=1).clip(1e-9)
        starts = np.concatenate([[0.0], lengths.cumsum()])
        best = np.full(len(colors), np.inf)
        along = np.zeros(len(colors))
        for corner, step, length, start in zip(
            corners[:-1], steps, lengths, starts[:-1], strict=True
        ):
            share = ((colors - corner) @ step / length**2).clip(0, 1)
            distance = ((colors - corner - share[:, None] * step) ** 2).sum(axis=1)
            nearer = distance < best
            best[nearer] = distance[nearer]
            along[nearer] = start + share[nearer] * length
        return np.sqrt(best), along / starts[-1]

    def along(self, pixels: Array) -> npt.NDArray[np.uint8]:
        """H×W×3 pixels → H×W, 0 at the cold end and 255 at the hot one."""
        rough = (pixels >> 2).astype(np.int64) @ (1 << 12, 1 << 6, 1)
        found, place = np.unique(rough, return_inverse=True)
        colors = np.stack([found >> 12, found >> 6 & 63, found & 63], axis=1) * 4.0 + 1.5
        _, along = self.project(colors)
        values = np.asarray((along * 255).round(), dtype=np.uint8)
        return values[place].reshape(pixels.shape[:2])


def _longest_way(points: Array) -> Array:
    """N×3 points → those on the longest path of their minimum spanning tree, in order."""
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    count = len(points)
    neighbours: list[list[int]] = [[] for _ in range(count)]
    nearest, parent = apart[0].copy(), np.zeros(count, dtype=int)
    outside = np.ones(count, dtype=bool)
    outside[0] = False
    while outside.any():
        new = int(np.where(outside, nearest, np.inf).argmin())
        neighbours[new].append(int(parent[new]))
        neighbours[int(parent[new])].append(new)
        outside[new] = False
        closer = outside & (apart[new] < nearest)
        nearest[closer], parent[closer] = apart[new][closer], new

    def farthest(start: int) -> tuple[int, dict[int, int]]:
        reached, before, todo = {start: 0.0}, {start: -1}, [start]
        while todo:
            point = todo.pop()
            for other in neighbours[point]:
                if other not in reached:
                    reached[other] = reached[point] + float(apart[point, other])
                    before[other] = point
                    todo.append(other)
        return max(reached, key=lambda point: reached[point]), before

    one_end, _ = farthest(0)
    point, before = farthest(one_end)
    way = []
    while point != -1:
        way.append(point)
        point = before[point]
    return points[way]
