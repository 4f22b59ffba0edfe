"""The nearest of a gallery, proven: scores are rounded, so the best rows are computed again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model import Modulation
from service.gallery.index.features import Features, Measured
from service.gallery.index.inner_products import Best, rounding_bound

_MARGIN = 1.1  # the first rows computed score down to this many bounds below the last one wanted
_GROW = 4  # this many times as many rows are computed while the proof fails
_ROUNDED = 2.0**-40  # more than what float64 rounds of the terms of a distance


class Nearest(NamedTuple):
    """Rows and their exact distances, M each, in order of score; parts M×P or None.

    proven: the nearest that were wanted, of all that was searched, are certainly among them.
    """

    best: Best
    distances: npt.NDArray[np.float64]
    parts: npt.NDArray[np.float32] | None
    proven: bool


def first_rows(features: Features, w: Tensor, best: Best, count: int, *, exact: bool) -> Best:
    """The rows to compute first: enough for the proof if the `count`-th score is close."""
    if features.metric == "cosine":
        return best
    return _first(best, count, rounding_bound(features, w, exact=exact))


def _first(best: Best, count: int, bound: float) -> Best:
    if count >= len(best.scores):
        return best
    near = best.scores >= best.scores[count - 1] - _MARGIN * bound
    return best.first(max(count, int(np.count_nonzero(near))) + 1)


def nearest_of(
    features: Features,
    x: Tensor,
    modulation: Modulation,
    projected: tuple[Tensor, float],
    best: Best,
    *,
    searched: int,
    count: int,
    exact: bool,
    first: Measured | None = None,
) -> Nearest:
    """Compute the distances of the best-scored rows until the `count` nearest are certain.

    x: one query, P×D, with γ, β (1×D), in float64. projected: its w and c, as `project` gives
    them. best: of `searched` rows, the best first. exact: their scores come from fp32, not bf16.
    first: what `rescore` gives for `first_rows`, where it was computed for several queries at once.
    A row that was not computed scored at most as much as the last one that was, so its D² is at
    least c − score − bound; none that is not in `best` is near enough where it is complete. Where
    `best` is too short for the proof, all its rows are computed.
    """
    if features.metric == "cosine":  # `best` has every row that can be among the nearest
        distances, parts = first or features.rescore(x, modulation, best.positions)
        return Nearest(best, distances, parts, proven=True)
    w, c = projected
    bound = rounding_bound(features, w, exact=exact)
    take = len(_first(best, count, bound).positions)
    while True:
        kept = best.first(take)
        distances, parts = first or features.rescore(x, modulation, kept.positions)
        first = None
        every = len(kept.positions)
        if every == searched or (best.complete and every == len(best.positions)):
            return Nearest(kept, distances, parts, proven=True)
        lost = (1 - _ROUNDED) * c - float(kept.scores[-1]) - bound
        proven = int(np.count_nonzero(distances**2 < lost)) >= count
        if proven or take >= len(best.positions):
            return Nearest(kept, distances, parts, proven)
        take *= _GROW
