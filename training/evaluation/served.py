"""The answer to one query as the service gives it: scores, re-ranking, probabilities.

The formulas and their order are those of `model.ranking`. Every item is scored here, as with
`exhaustive`, and the moments are of all distances, not of a sample of a large gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model import Modality
from model.config import MODALITIES
from model.ranking import (
    Answer,
    Moments,
    RankingFacts,
    Searched,
    combined,
    moments_of,
    posterior,
    reranked,
)
from training.evaluation.metrics import FloatArray, IntArray

Between = Callable[[IntArray], FloatArray]


@dataclass(frozen=True)
class Among:
    """Distances among the items at some places of those that a query searches.

    matrix: among all items. items: the places of those searched.
    """

    matrix: npt.NDArray[np.floating]
    items: IntArray

    def __call__(self, places: IntArray) -> FloatArray:
        chosen = self.items[places]
        return self.matrix[np.ix_(chosen, chosen)].astype(np.float64)


@dataclass(frozen=True)
class Ranked:
    """One query and N items: their scores, larger is better, and what the posterior asks."""

    scores: FloatArray
    reranked: bool
    searched: Searched


def ranked(
    distances: FloatArray,
    modalities: npt.NDArray[np.str_],
    people: IntArray,
    *,
    query: str,
    facts: RankingFacts | None,
    prior: Mapping[Modality, Moments],
    between: Between | None = None,
) -> Ranked:
    """Rank N items, at least one, for a query of one image.

    distances: of the query to the items, modulated or not. modalities, people: of the items; a
    person is negative without a label. query: the modality of the query.
    facts, prior: of the checkpoint, and the moments of the query's distances to its references.
    Without them, the items' own moments are all there is.
    between: unmodulated distances among the items at some places; None leaves out re-ranking.
    """
    if facts is None:
        kinds = (m for m in MODALITIES if (modalities == m).any())
        prior = {m: moments_of(distances[modalities == m]) for m in kinds}
    scores, ratio = combined(distances, modalities, prior, facts.prior_items if facts else 0.0)
    named = people >= 0
    labelled, different = int(named.sum()), np.unique(people[named]).size
    unlabelled = people.size - labelled
    reranking = facts.reranking if facts and between else None
    before = scores.max()
    if facts and between and reranking:
        images = reranking.images(labelled, different, unlabelled)
        scores = reranked(scores, modalities, between, facts, reranking, images)
    searched = Searched(
        people=different + unlabelled,
        items=people.size,
        unlabelled=unlabelled,
        own=float((modalities == query).mean()),
        ratio=ratio,
        raised=float(scores.max() - before),
    )
    return Ranked(scores, reranking is not None, searched)


def answer(
    found: Ranked, people: IntArray, facts: RankingFacts, *, modulated: bool
) -> Answer | None:
    """The probabilities of a ranked search at even odds; None without a fit for such searches."""
    fits = facts.posteriors_of(modulated=modulated, reranked=found.reranked)
    if fits is None:
        return None
    return posterior(*(found.scores, people, found.searched), labelled=fits[0], unlabelled=fits[1])
