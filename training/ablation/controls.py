"""Control rankings of a trained network: what the query's own γ, β add to what all queries share.

A network with instance alignment ranks in four ways: modulated, as it was trained; with every query
given the mean γ, β of all queries of the search; modulated at a strength that was chosen on other
people; and unmodulated. The first two differ in what is the query's own, and in nothing else.
"""

from __future__ import annotations

import numpy as np
import torch

from model import CMT, Modulation, Strength, modulation_of
from training.ablation.results import ChosenStrength, RankingResult, SearchResult
from training.evaluation.embedding import Embedded
from training.evaluation.metrics import QueryScores
from training.evaluation.scoring import Trial, distances, mean_modulation
from training.evaluation.splits import Split

STRENGTHS = tuple(step / 10 for step in range(11))


def ranking_under(
    model: CMT, embedded: Embedded, split: Split, modulation: Modulation
) -> RankingResult:
    """A search ranked under given γ, β of its queries, Q×D each; see `scores_under`.

    Raises ValueError where no query of a trial has a positive.
    """
    return RankingResult.over(scores_under(model, embedded, split, modulation))


def scores_under(
    model: CMT, embedded: Embedded, split: Split, modulation: Modulation
) -> list[QueryScores]:
    """Every query of a search under its row of γ, β, in the network's metric; one entry a trial."""
    pool = np.unique(np.concatenate(split.galleries))
    x, y = (embedded.embedding[torch.from_numpy(rows)] for rows in (split.queries, pool))
    distance = distances(model.distance, x, y, modulation)
    trials = [
        Trial(embedded.samples, split, number, pool) for number in range(len(split.galleries))
    ]
    return [trial.scores(trial.of(distance)) for trial in trials]


def own_modulation(model: CMT, embedded: Embedded, split: Split) -> Modulation:
    """γ, β of the queries of a search as the network generates them: Q×D each."""
    return modulation_of(model, embedded.embedding[torch.from_numpy(split.queries)])


def choose_strength(model: CMT, embedded: Embedded, split: Split) -> ChosenStrength:
    """The strength of the highest mAP on a search, of people whose figures are not reported.

    The centre is the mean of γ over its queries and channels. Of equal mAP, the weaker one.
    """
    own = own_modulation(model, embedded, split)
    centre = float(own.gamma.mean())
    of_each = [Strength(strength, centre).applied(own) for strength in STRENGTHS]
    mean_ap = [ranking_under(model, embedded, split, of).mean("mean_ap") for of in of_each]
    best = int(np.argmax(mean_ap))
    return ChosenStrength(
        strength=STRENGTHS[best], centre=centre, tried=list(STRENGTHS), mean_ap=mean_ap
    )


def with_controls(
    model: CMT,
    embedded: Embedded,
    split: Split,
    result: SearchResult,
    strength: ChosenStrength | None,
) -> SearchResult:
    """`result` with the rankings by the mean γ, β and, where one was chosen, by the strength."""
    own = own_modulation(model, embedded, split)
    found = {"mean_modulation": ranking_under(model, embedded, split, mean_modulation(own))}
    if strength is not None:
        weakened = Strength(strength.strength, strength.centre).applied(own)
        found["weakened"] = ranking_under(model, embedded, split, weakened)
    return result.model_copy(update=found)
