"""One score for items of both modalities, larger is better.

A query's distances to infrared and to visible items differ by much more than those to the right and
to a wrong person. Each is therefore measured in deviations from the mean of its modality:

    score = −(d − μ) / σ

with μ and σ of the query's distances to what is searched of that modality. In a gallery of few
items these say little, so that the query's distances to the checkpoint's reference embeddings are
counted among them, as if they were `weight` further items. Within one modality the order is that of
the distances. Speaker verification calls such scores normalised by a cohort (Auckenthaler, Carey,
Lloyd-Thomas 2000).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_SMALLEST = 1e-9  # a deviation below it counts as none


class Moments(NamedTuple):
    """Mean and deviation of distances."""

    mean: float
    deviation: float


def moments_of(distances: FloatArray) -> Moments:
    """Of at least one distance."""
    mean = float(distances.sum()) / distances.size
    apart = distances - mean
    return Moments(mean, math.sqrt(float((apart * apart).sum()) / distances.size))


def blended(gallery: Moments | None, count: int, prior: Moments, weight: float) -> Moments:
    """Those of `count` items and of the prior counted as `weight` items, taken together.

    gallery: None where nothing is searched.
    """
    if gallery is None or count == 0:
        return prior
    share = count / (count + weight)
    mean = share * gallery.mean + (1 - share) * prior.mean
    variance = share * (gallery.deviation**2 + (gallery.mean - mean) ** 2)
    variance += (1 - share) * (prior.deviation**2 + (prior.mean - mean) ** 2)
    return Moments(mean, math.sqrt(variance))


def scores(distances: FloatArray, moments: Moments) -> FloatArray:
    """Distances of one modality → scores; finite where all distances are equal, too."""
    deviation = moments.deviation if moments.deviation > _SMALLEST else 1.0
    return (moments.mean - distances) / deviation
