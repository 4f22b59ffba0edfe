"""From distances to an answer: one score across modalities, re-ranking, and probabilities.

Distances of a query to visible and to infrared items are on two scales, and those of two queries on
two more. `scores` brings them on one; `reranking` adds what the neighbours of an item say; and
`posterior` says how probable it is that an answer is right, "not enrolled" included. `facts` is
what a checkpoint holds of all this; `training.calibration` chooses it on held-out people.
"""

from model.ranking.facts import AgreementFit, PosteriorFit, RankingFacts, Reranking
from model.ranking.posterior import Answer, Beyond, Searched, posterior
from model.ranking.reranking import reciprocal_similarity
from model.ranking.scores import Moments, blended, moments_of, scores
from model.ranking.search import (
    DEPTH,
    combined,
    in_deviations,
    neighbours_shared,
    own_share,
    reranked,
    spread_ratio,
)

__all__ = [
    "DEPTH",
    "AgreementFit",
    "Answer",
    "Beyond",
    "Moments",
    "PosteriorFit",
    "RankingFacts",
    "Reranking",
    "Searched",
    "blended",
    "combined",
    "in_deviations",
    "moments_of",
    "neighbours_shared",
    "own_share",
    "posterior",
    "reciprocal_similarity",
    "reranked",
    "scores",
    "spread_ratio",
]
