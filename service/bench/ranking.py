"""Rank-1, mAP and mINP of queries with known matches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Ranking(NamedTuple):
    """Means over the queries that have a match, in [0, 1].

    mean_inp: mean of (number of matches) / (rank of the last match) (Ye et al., TPAMI 2021).
    """

    rank_1: float
    mean_ap: float
    mean_inp: float


def ranked(
    distances: npt.NDArray[np.floating],
    matches: npt.NDArray[np.bool_],
    counts: npt.NDArray[np.bool_],
) -> Ranking:
    """Rank-1, mAP and mINP of Q queries against N items.

    All Q×N: distances; matches, which items show the query's person; counts, which items count at
    all. Items at equal distance keep their order. At least one query must have a match that counts.
    """
    scores = []
    for q in np.flatnonzero((matches & counts).any(axis=1)):
        order = np.argsort(distances[q, counts[q]], kind="stable")
        ranks = 1 + np.flatnonzero(matches[q, counts[q]][order])
        found = np.arange(1, len(ranks) + 1)
        scores.append((ranks[0] == 1, (found / ranks).mean(), len(ranks) / ranks[-1]))
    return Ranking(*np.mean(scores, axis=0, dtype=float).tolist())
