"""k-reciprocal re-ranking of one query's shortlist (Zhong et al., CVPR 2017), across modalities.

Two images are alike if their nearest images are the same ones. The gain comes from the distances
between gallery items, most of them within one modality, which the network knows far better than
those across. As in the paper: neighbourhoods of mutual nearest neighbours, widened by those of
their members that lie in them for two thirds, weights that fall with the distance, local query
expansion, and the Jaccard measure. Not as in the paper: all distances are in deviations from the
mean of their pair of modalities (or the neighbourhoods would be those of the modality), weights
fall from the nearest on, and the result adds to the score in place of being mixed with a distance,
so that items that are not re-ranked keep a comparable one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model.ranking.facts import Reranking

Array32 = npt.NDArray[np.float32]


def reciprocal_similarity(
    to_query: npt.NDArray[np.floating],
    between: npt.NDArray[np.floating],
    size: int,
    reranking: Reranking,
) -> npt.NDArray[np.float64]:
    """How much of the query's neighbourhood each of N items shares: N numbers in [0, 1].

    to_query: N distances of the query to the items. between: N×N distances among the items, whose
    diagonal does not count. Both in deviations, see `model.ranking.scores`, so that they compare.
    size: k1, see `Reranking.size`.
    """
    count = len(to_query) + 1  # the query comes first
    distance = np.empty((count, count), np.float32)
    distance[0, 1:] = distance[1:, 0] = to_query
    distance[1:, 1:] = between
    np.fill_diagonal(distance, -np.inf)  # everything is its own nearest
    nearest = np.argsort(distance, axis=1, kind="stable")
    mutual = _mutual(nearest[:, : size + 1])
    smaller = _mutual(nearest[:, : round(size / 2) + 1])
    shared = _sums(mutual, smaller)
    joins = mutual & (3 * shared > 2 * smaller.sum(1))
    neighbourhood = mutual | (_sums(joins, smaller) > 0)

    np.fill_diagonal(distance, np.inf)
    least = distance.min(1, keepdims=True) if count > 1 else np.zeros((1, 1), np.float32)
    np.fill_diagonal(distance, least[:, 0])
    weights: Array32 = np.exp(-reranking.sharpness * (distance - least)) * neighbourhood
    weights /= weights.sum(1, keepdims=True)
    encoding = weights[nearest[:, : reranking.expansion]].mean(1)
    common = np.minimum(encoding[0], encoding[1:]).sum(1, dtype=np.float64)
    similarity: npt.NDArray[np.float64] = common / (2 - common)  # each row sums to 1
    return np.clip(similarity, 0, 1)


def _mutual(lists: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """M×k lists of images → M×M: whether two are in each other's lists."""
    member = np.zeros((len(lists), len(lists)), np.bool_)
    np.put_along_axis(member, lists, True, axis=1)
    return member & member.T


def _sums(chosen: npt.NDArray[np.bool_], rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Each row of M×M is the sum of the `rows` that it chooses, itself always among them.

    A matrix product; but few are chosen, and BLAS would wait for threads that are busy elsewhere.
    """
    who, of = np.nonzero(chosen)
    sums: npt.NDArray[np.int64] = np.add.reduceat(
        rows[of].astype(np.int64), np.searchsorted(who, np.arange(len(rows)))
    )
    return sums
