"""Rank metrics of the three public visible-infrared protocols, from one distance matrix.

Sources: the public evaluation code of SYSU-MM01 (Wu et al., ICCV 2017), RegDB (Nguyen et al.,
Sensors 2017) and LLCM (Zhang and Wang, CVPR 2023); mINP is from Ye et al. (TPAMI 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

Protocol = Literal["sysu", "regdb", "llcm"]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RankMetrics:
    """Means over the queries that have a positive in the gallery; all are fractions in [0, 1].

    cmc: entry k−1 is rank-k, the share of queries whose identity is found within the first k.
    mean_ap: mean average precision.
    mean_inp: mean inverse negative penalty, positives / rank of the last positive.
    """

    cmc: FloatArray
    mean_ap: float
    mean_inp: float


@dataclass(frozen=True)
class QueryScores:
    """What `RankMetrics` averages, query by query (each Q).

    answerable: whether the query has a positive left in the gallery; the other three are 0
        where it has none.
    first_rank: 1-based rank that CMC counts.
    average_precision: in [0, 1].
    inverse_negative_penalty: in [0, 1].
    """

    answerable: BoolArray
    first_rank: IntArray
    average_precision: FloatArray
    inverse_negative_penalty: FloatArray

    def placed(self, rows: IntArray, count: int) -> QueryScores:
        """The same as scores of `count` queries, of which these are at `rows`; others are 0."""
        fields_of = {field.name: getattr(self, field.name) for field in fields(QueryScores)}
        spread = {name: np.zeros(count, dtype=of.dtype) for name, of in fields_of.items()}
        for name, of in fields_of.items():
            spread[name][rows] = of
        return QueryScores(**spread)

    def summary(self, max_rank: int = 20) -> RankMetrics:
        """Average over the answerable queries.

        Raises ValueError where no query has a positive in the gallery.
        """
        if not self.answerable.any():
            raise ValueError(
                "No query has an image of its own identity in the gallery; check that the "
                "identities and cameras of both belong to the same split."
            )
        first = self.first_rank[self.answerable]
        return RankMetrics(
            cmc=(first[:, None] <= np.arange(1, max_rank + 1)).mean(axis=0),
            mean_ap=float(self.average_precision[self.answerable].mean()),
            mean_inp=float(self.inverse_negative_penalty[self.answerable].mean()),
        )


def mean_precision(trials: Sequence[QueryScores]) -> tuple[FloatArray, BoolArray]:
    """Each query's average precision, mean over the trials in which it is answerable (0 where it
    never is), and whether it ever is."""
    times = np.sum([scores.answerable for scores in trials], axis=0)
    total = np.sum([scores.average_precision for scores in trials], axis=0)
    return total / np.maximum(times, 1), times > 0


def rank_metrics(
    distance: npt.ArrayLike,
    query_ids: npt.ArrayLike,
    gallery_ids: npt.ArrayLike,
    query_cameras: npt.ArrayLike,
    gallery_cameras: npt.ArrayLike,
    protocol: Protocol = "sysu",
    *,
    max_rank: int = 20,
) -> RankMetrics:
    """CMC, mAP and mINP of a protocol.

    distance: Q×N, smaller is nearer. Gallery images at equal distance keep the order of the
        columns (a stable sort).
    query_ids: Q identities.
    gallery_ids: N identities.
    query_cameras: Q camera numbers.
    gallery_cameras: N camera numbers.
    protocol: "sysu" and "llcm" leave gallery images out (`excluded_pairs`) and count CMC over
        unique identities: only the first image of every identity takes a rank. "regdb" leaves
        none out and counts every image. AP and INP count every image that is left.
    max_rank: length of the cmc.
    Raises ValueError where shapes do not fit, a distance is NaN, or no query has a positive.
    """
    return score_queries(
        distance, query_ids, gallery_ids, query_cameras, gallery_cameras, protocol
    ).summary(max_rank)


def excluded_pairs(
    query_ids: npt.ArrayLike,
    gallery_ids: npt.ArrayLike,
    query_cameras: npt.ArrayLike,
    gallery_cameras: npt.ArrayLike,
    protocol: Protocol,
) -> BoolArray:
    """Gallery images that a query ignores, Q×N.

    SYSU-MM01: camera 2 for queries of camera 3, which stands at the same place. LLCM: the query's
    own identity in the query's own camera. RegDB: none.
    """
    query_camera = np.asarray(query_cameras)[:, None]
    gallery_camera = np.asarray(gallery_cameras)[None, :]
    if protocol == "sysu":
        return np.asarray((query_camera == 3) & (gallery_camera == 2))
    if protocol == "llcm":
        same_person = np.asarray(query_ids)[:, None] == np.asarray(gallery_ids)[None, :]
        return np.asarray(same_person & (query_camera == gallery_camera))
    if protocol == "regdb":
        return np.zeros((query_camera.size, gallery_camera.size), dtype=np.bool_)
    raise ValueError(f"Unknown protocol {protocol!r}; choose sysu, regdb or llcm.")


def score_queries(
    distance: npt.ArrayLike,
    query_ids: npt.ArrayLike,
    gallery_ids: npt.ArrayLike,
    query_cameras: npt.ArrayLike,
    gallery_cameras: npt.ArrayLike,
    protocol: Protocol = "sysu",
) -> QueryScores:
    """Score every query by itself; arguments and errors as in `rank_metrics`."""
    matrix = _checked_distance(distance)
    n_queries, n_gallery = matrix.shape
    query_ids = _checked_labels("query_ids", query_ids, n_queries)
    gallery_ids = _checked_labels("gallery_ids", gallery_ids, n_gallery)
    query_cameras = _checked_labels("query_cameras", query_cameras, n_queries)
    gallery_cameras = _checked_labels("gallery_cameras", gallery_cameras, n_gallery)
    excluded = excluded_pairs(
        query_ids, gallery_ids, query_cameras, gallery_cameras, protocol
    )  # Q×N
    scores, tied = _score_by_counting(matrix, query_ids, gallery_ids, excluded, protocol)
    rows = np.flatnonzero(tied)
    if rows.size:
        sorted_scores = _score_by_sorting(
            matrix[rows], query_ids[rows], gallery_ids, excluded[rows], protocol
        )
        for field in fields(QueryScores):
            getattr(scores, field.name)[rows] = getattr(sorted_scores, field.name)
    return scores


def _score_by_counting(
    matrix: npt.NDArray[Any],
    query_ids: npt.NDArray[Any],
    gallery_ids: npt.NDArray[Any],
    excluded: BoolArray,
    protocol: Protocol,
) -> tuple[QueryScores, BoolArray]:
    """Scores from sorted distances alone: a positive's rank is 1 + the number of nearer images.

    Sorting numbers is many times faster than the stable sort of indices that says which image has
    which rank, and a query has few positives to look up. Where images are at exactly the distance
    of a positive the count cannot say who comes first: the second result marks those queries (Q),
    whose scores are to be taken from `_score_by_sorting`.
    """
    n_gallery = gallery_ids.size
    order = np.argsort(gallery_ids, kind="stable")
    identities, starts, sizes = np.unique(gallery_ids[order], return_index=True, return_counts=True)
    # Images of one identity side by side; what a query ignores is infinitely far.
    grouped = np.take(np.where(excluded, np.inf, matrix), order, axis=1)  # Q×N

    # Columns of each query's positives, as many for every query as the largest identity has.
    own = np.searchsorted(identities, query_ids).clip(max=identities.size - 1)
    found = np.arange(1, sizes.max() + 1)  # K
    columns = np.minimum(starts[own, None] + found - 1, n_gallery - 1)  # Q×K
    kept = (found <= sizes[own, None]) & (identities[own] == query_ids)[:, None]
    kept &= ~np.take_along_axis(excluded, order[columns], axis=1)
    positives = np.take_along_axis(grouped, columns, axis=1)

    if protocol != "regdb":
        nearest = np.minimum.reduceat(grouped, starts, axis=1)  # Q×identities
        own_nearest = np.take_along_axis(nearest, own[:, None], axis=1)
        first = (nearest < own_nearest).sum(axis=1) + 1
    grouped.sort(axis=1)
    nearer, not_farther = (
        torch.searchsorted(
            torch.from_numpy(grouped), torch.from_numpy(positives), right=right
        ).numpy()
        for right in (False, True)
    )  # Q×K
    tied = ((not_farther - nearer > 1) & kept).any(axis=1)

    # Ascending ranks of the kept positives; the others behind them.
    rank = np.sort(np.where(kept, nearer + 1, n_gallery + 1), axis=1)
    count = kept.sum(axis=1)
    if protocol == "regdb":
        first = rank[:, 0]
    precision = np.where(found <= count[:, None], found / rank, 0.0)
    last = np.take_along_axis(rank, np.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    scores = QueryScores(
        answerable=count > 0,
        first_rank=np.where(count > 0, first, 0),
        average_precision=precision.sum(axis=1) / np.maximum(count, 1),
        inverse_negative_penalty=count / last,
    )
    return scores, tied


def _score_by_sorting(
    matrix: npt.NDArray[Any],
    query_ids: npt.NDArray[Any],
    gallery_ids: npt.NDArray[Any],
    excluded: BoolArray,
    protocol: Protocol,
) -> QueryScores:
    """Scores from the whole ranking, images at equal distance in the order of the columns."""
    n_gallery = matrix.shape[1]
    # In the order of the ranking, nearest first: what is left, and at which 1-based rank.
    order = np.argsort(matrix, axis=1, kind="stable")  # Q×N
    kept = ~np.take_along_axis(excluded, order, axis=1)
    rank = np.cumsum(kept, axis=1, dtype=np.int64)
    positive = (gallery_ids[order] == query_ids[:, None]) & kept

    n_positives = positive.sum(axis=1)
    answerable = n_positives > 0
    divisor = np.maximum(n_positives, 1)
    precision = np.cumsum(positive, axis=1) / np.maximum(rank, 1)
    average_precision = (precision * positive).sum(axis=1) / divisor
    last_rank = np.maximum((rank * positive).max(axis=1), 1)

    if protocol == "regdb":
        first_rank = np.where(positive, rank, n_gallery + 1).min(axis=1)
    else:
        # Back in gallery order, where images can be grouped by identity.
        rank_of_image = np.empty_like(rank)
        np.put_along_axis(rank_of_image, order, np.where(kept, rank, n_gallery + 1), axis=1)
        first_rank = _rank_among_identities(rank_of_image, gallery_ids, query_ids)
    return QueryScores(
        answerable=answerable,
        first_rank=np.where(answerable, first_rank, 0).astype(np.int64),
        average_precision=average_precision,
        inverse_negative_penalty=n_positives / last_rank,
    )


def _rank_among_identities(
    rank_of_image: IntArray, gallery_ids: npt.NDArray[Any], query_ids: npt.NDArray[Any]
) -> IntArray:
    """Rank of the query's identity when each identity counts once, by its nearest image. Q."""
    by_identity = np.argsort(gallery_ids, kind="stable")
    identities, starts = np.unique(gallery_ids[by_identity], return_index=True)
    best = np.minimum.reduceat(rank_of_image[:, by_identity], starts, axis=1)  # Q×identities
    # An absent identity takes any column: its query is not answerable and the result is unused.
    own = np.searchsorted(identities, query_ids).clip(max=identities.size - 1)
    own_best = np.take_along_axis(best, own[:, None], axis=1)
    return np.asarray((best < own_best).sum(axis=1) + 1)


def _checked_distance(distance: npt.ArrayLike) -> npt.NDArray[Any]:
    matrix = np.asarray(distance)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"distance must be Q×N with at least one of each, not {matrix.shape}.")
    if np.isnan(matrix).any():
        raise ValueError("distance holds NaN, which has no place in a ranking; check the features.")
    return matrix


def _checked_labels(name: str, labels: npt.ArrayLike, count: int) -> npt.NDArray[Any]:
    array = np.asarray(labels)
    if array.shape != (count,):
        raise ValueError(
            f"{name} must have one entry for each of {count}, not shape {array.shape}."
        )
    return array
