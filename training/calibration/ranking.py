"""Everything that a checkpoint says of ranking but its strength, fitted on held-out people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from model import CMT, Modality, Modulation
from model.calibration import reference_distances
from model.config import MODALITIES, Metric
from model.ranking import RankingFacts
from training.calibration.agreement import PartFigures, fit_agreements
from training.calibration.extrapolation import Extrapolated, extrapolate
from training.calibration.people import HeldOut
from training.calibration.posterior import Judged, fit_posterior
from training.calibration.reranking import RerankingChoice, choose_reranking
from training.calibration.searches import Draw, Fold

PRIOR_ITEMS = (10.0, 30.0, 100.0)
SEARCHES = 500  # in a fold, of each modality of the query and kind of gallery
RERANKED = 100  # the same to choose re-ranking, with as many images of each person
_OF_A_PERSON = 15  # searches at most: a hundred of ten people say no more than fifty


@dataclass(frozen=True)
class RankingFit:
    """What was chosen, and what reports need.

    prior_items: cross-fitted log loss [nats] of each. judged: one for each posterior of the facts,
    parts: one for each agreement.
    """

    facts: RankingFacts
    prior_items: dict[float, float]
    reranking: RerankingChoice
    judged: list[Judged]
    parts: list[PartFigures]
    extrapolated: list[Extrapolated]

    def to_json(self) -> dict[str, Any]:
        """What is not among the facts."""
        return {
            "prior_items": {f"{items:g}": loss for items, loss in self.prior_items.items()},
            "reranking": {kind: asdict(gain) for kind, gain in self.reranking.gains.items()},
            "posteriors": [
                {
                    "modulated": one.fit.modulated,
                    "reranked": one.fit.reranked,
                    "labelled": one.fit.labelled,
                    "by_kind": {kind: asdict(f) for kind, f in one.by_kind.items()},
                    "reliability": one.reliability.to_json(),
                }
                for one in self.judged
            ],
            "agreements": [asdict(figures) for figures in self.parts],
            "extrapolated": [asdict(row) for row in self.extrapolated],
        }


def fit_ranking(
    model: CMT,
    held_out: HeldOut,
    references: Mapping[Modality, Tensor],
    progress: Callable[[str], None] = lambda _: None,
) -> RankingFit | None:
    """Fit on random searches; None where there are no people to draw any from.

    model: at its strength. references: what the checkpoint will carry. progress: told what is
    being fitted.
    Raises DatasetError where a fit is stuck.
    """
    folds = []
    for number, rows in enumerate(held_out.folds()):
        fold = Fold(model, held_out, rows)
        draw = Draw(fold, number)
        drawn = draw.searches(min(SEARCHES, _OF_A_PERSON * len(draw.people)))
        if not drawn:
            return None
        folds.append(fold.asking(drawn))
    progress("the prior of scores")
    losses = {
        items: fit_posterior(
            [fold.scored(items, modulated=True) for fold in folds],
            modulated=True,
            reranked=False,
            labelled=True,
        ).fit.log_loss
        for items in PRIOR_ITEMS
    }
    prior_items = min(losses, key=losses.__getitem__)
    facts = RankingFacts(
        prior_items=prior_items, between=between_references(references, model.config.metric)
    )
    progress("re-ranking")
    count = min(RERANKED, _OF_A_PERSON * min(len(np.unique(fold.people)) for fold in folds))
    reranking = choose_reranking(folds, facts, modulated=True, count=count)
    facts = facts.model_copy(update={"reranking": reranking.chosen})
    judged = []
    for modulated, reranked, labelled in product((True, False), repeat=3):
        progress(
            f"probabilities of {'modulated' if modulated else 'unmodulated'} and "
            f"{'re-ranked' if reranked else 'plain'} searches of "
            f"{'labelled' if labelled else 'unlabelled'} galleries"
        )
        found = [fold.scored(prior_items, modulated=modulated) for fold in folds]
        if reranked:
            found = [
                [fold.reranked(one, facts, reranking.chosen, labelled=labelled) for one in of_fold]
                for fold, of_fold in zip(folds, found, strict=True)
            ]
        judged.append(
            fit_posterior(found, modulated=modulated, reranked=reranked, labelled=labelled)
        )
    progress("the agreement of parts")
    agreements = fit_agreements(folds) if model.config.metric == "euclidean" else []
    facts = facts.model_copy(
        update={
            "posteriors": tuple(one.fit for one in judged),
            "agreements": tuple(fit for fit, _ in agreements),
        }
    )
    progress("what probabilities say of a million items")
    plain = facts.posterior(modulated=True, reranked=False, labelled=True)
    assert plain is not None
    return RankingFit(
        facts=facts,
        prior_items=losses,
        reranking=reranking,
        judged=judged,
        parts=[figures for _, figures in agreements],
        extrapolated=extrapolate(folds, plain, prior_items, modulated=True, count=count // 2),
    )


def between_references(
    references: Mapping[Modality, Tensor], metric: Metric
) -> dict[str, tuple[float, float]]:
    """`RankingFacts.between`: of unmodulated distances, an image's to itself left out."""
    found = {}
    for a, b in product(MODALITIES, MODALITIES):
        x = references[a].float()
        identity = Modulation.identity(len(x), x.shape[2])
        distances = reference_distances(x, identity, references[b], metric)
        if a == b:
            distances = distances[~np.eye(len(x), dtype=np.bool_)]
        if distances.size:
            found[f"{a} {b}"] = float(distances.mean()), float(distances.std()) or 1.0
    return found
