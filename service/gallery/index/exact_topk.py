"""The nearest of a gallery, proven: scores are rounded, so the best rows are computed again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model import Modulation
from service.gallery.index.features import Features
from service.gallery.index.inner_products import Best, rounding_bound

_MARGIN = 1.1  # the first rows computed score down to this many bounds below the last one wanted
_GROW = 4  # this many times as many rows are computed while the proof fails


class Nearest(NamedTuple):
    """Rows and their exact distances, M each, in order of score; parts M×P or None.

    proven: the nearest that were wanted, of all that was searched, are certainly among them.
    """

    best: Best
    distances: npt.NDArray[np.float64]
    parts: npt.NDArray[np.float32] | None
    proven: bool


def _first_take(best: Best, count: int, bound: float) -> int:
    """How many rows to compute first: enough for the proof if the `count`-th score is close."""
    if count >= len(best.scores):
        return count
    near = best.scores >= best.scores[count - 1] - _MARGIN * bound
    return max(count, int(np.count_nonzero(near))) + 1


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
) -> Nearest:
    """Compute the distances of the best-scored rows until the `count` nearest are certain.

    x: one query, P×D, with γ, β (1×D), in float64. projected: its w and c, as `project` gives
    them. best: of `searched` rows, the best first. exact: their scores come from fp32, not bf16. A
    row that was not computed scored at most as much as the last one that was, so its D² is at least
    c − score − bound. Where `best` is too short for the proof, all its rows are computed.
    """
    if features.metric == "cosine":  # `best` has every row that can be among the nearest
        distances, parts = features.rescore(x, modulation, best.positions)
        return Nearest(best, distances, parts, proven=True)
    w, c = projected
    bound = rounding_bound(features, w, exact=exact)
    take = _first_take(best, count, bound)
    while True:
        kept = best.first(take)
        distances, parts = features.rescore(x, modulation, kept.positions)
        if len(kept.positions) == searched:
            return Nearest(kept, distances, parts, proven=True)
        lost = c - float(kept.scores[-1]) - bound
        proven = int(np.count_nonzero(distances**2 < lost)) >= count
        if proven or take >= len(best.positions):
            return Nearest(kept, distances, parts, proven)
        take *= _GROW
