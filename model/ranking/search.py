"""A query's distances to all that is searched → scores that order the answer, step by step.

For callers who have them all, such as `training`; the service takes the same steps on shortlists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from model.config import MODALITIES, Modality
from model.ranking.facts import RankingFacts, Reranking
from model.ranking.reranking import reciprocal_similarity
from model.ranking.scores import FloatArray, Moments, blended, moments_of, scores

DEPTH = 100  # the best by score, which are re-ranked

Modalities = Sequence[Modality] | npt.NDArray[np.str_]


def combined(
    distances: FloatArray,
    modalities: Modalities,
    prior: Mapping[Modality, Moments],
    prior_items: float,
) -> tuple[FloatArray, float]:
    """N distances to items of both modalities → their scores, and `Searched.ratio`.

    prior: of the query's distances to the references.
    """
    names = np.asarray(modalities)
    found = np.empty(len(distances))
    counted = []
    for modality in MODALITIES:
        places = np.flatnonzero(names == modality)
        if not places.size:
            continue
        gallery, reference = moments_of(distances[places]), prior[modality]
        here = blended(gallery, places.size, reference, prior_items)
        found[places] = scores(distances[places], here)
        counted.append((places.size, here, reference))
    return found, spread_ratio(counted)


def spread_ratio(counted: Iterable[tuple[int, Moments, Moments]]) -> float:
    """`Searched.ratio`, of the items, blended moments and prior moments of each modality searched.

    The geometric mean of their ratios, weighted by the items; 1 where there is no deviation.
    """
    weight, total = 0, 0.0
    for items, here, reference in counted:
        if here.deviation > 0 and reference.deviation > 0:
            weight += items
            total += items * math.log(here.deviation / reference.deviation)
    return math.exp(total / weight) if weight else 1.0


def own_share(query: str, items: Mapping[Modality, int]) -> float:
    """`Searched.own`: of all items, by modality, those of the query's; half for a "mixed" one."""
    everything = sum(items.values())
    if query not in MODALITIES or not everything:
        return 0.5
    return sum(count for modality, count in items.items() if modality == query) / everything


def reranked(
    found: FloatArray,
    modalities: Modalities,
    between: Callable[[npt.NDArray[np.int64]], FloatArray],
    facts: RankingFacts,
    reranking: Reranking,
    images: float,
) -> FloatArray:
    """Scores of N items → the same, those of the best `DEPTH` raised by what their neighbours say.

    between: places of K items → their unmodulated distances, K×K. images: see `Reranking.images`.
    """
    share = reranking.share(images)
    if share == 0:
        return found
    best = np.argsort(-found, kind="stable")[:DEPTH]
    names, size = np.asarray(modalities)[best], reranking.size(images)
    raised = found.copy()
    raised[best] += share * neighbours_shared(
        found[best], names, between(best), facts.between, size, reranking
    )
    return raised


def neighbours_shared(
    found: FloatArray,
    modalities: Modalities,
    between: FloatArray,
    known: Mapping[str, tuple[float, float]],
    size: int,
    reranking: Reranking,
) -> FloatArray:
    """Scores of the K items to re-rank → how much of the query's neighbourhood each one shares.

    between, known: see `in_deviations`. size: of a neighbourhood.
    """
    apart = in_deviations(between, modalities, known)
    return reciprocal_similarity(-found, apart, size, reranking)


def in_deviations(
    between: FloatArray, modalities: Modalities, known: Mapping[str, tuple[float, float]]
) -> FloatArray:
    """K×K distances among items → in deviations from the mean of their pair of modalities.

    known: `RankingFacts.between`. A pair that it lacks (nothing is known, or there was a single
    reference of a modality) goes by these distances alone.
    """
    names = np.asarray(modalities)
    apart = np.empty_like(between)
    for first, second in product(np.unique(names).tolist(), repeat=2):
        block = np.ix_(names == first, names == second)
        mean, deviation = known.get(f"{first} {second}") or moments_of(between[block])
        apart[block] = (between[block] - mean) / (deviation or 1.0)
    return apart
