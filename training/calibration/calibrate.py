"""Fit all that a checkpoint says of ranking, on people of one or more sets that it does not know.

In this order, as each builds on what came before: the strength of the modulation; the curves from
distance to similarity; then, on random searches, what orders an answer and how probable it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model import CMT, Calibration
from model.calibration import CalibrationFacts
from model.config import MODALITIES
from model.training_facts import LearntPeople
from training.calibration.curves import Reliability
from training.calibration.pairs import PairMaker
from training.calibration.people import together
from training.calibration.ranking import RankingFit, fit_ranking
from training.calibration.similarity import check_people, fit_curves
from training.calibration.strength import StrengthChoice, choose_strength
from training.datasets import DatasetName
from training.evaluation.embedding import Embedded


@dataclass(frozen=True)
class Fit:
    """A calibration and what only reports need.

    calibration: to store in the checkpoint.
    strength: how it was chosen.
    reliabilities: cross-fitted, one for each curve.
    ranking: None where the people allow no searches.
    left_out: a sentence for each thing that could not be fitted.
    """

    calibration: Calibration
    strength: StrengthChoice
    reliabilities: list[Reliability]
    ranking: RankingFit | None
    left_out: list[str]

    def to_json(self) -> dict[str, Any]:
        """The facts with the reliability diagram of each curve, and how all of it was chosen."""
        facts = self.calibration.facts.model_dump(mode="json")
        for people in facts["people"]:
            del people["images"]
        for entry, diagram in zip(facts["maps"], self.reliabilities, strict=True):
            entry["reliability"] = diagram.to_json()
        facts["references"] = {m: len(rows) for m, rows in self.calibration.references.items()}
        return facts | {
            "left_out": self.left_out,
            "chosen": {
                "strength": [asdict(step) for step in self.strength.steps],
                "ranking": None if self.ranking is None else self.ranking.to_json(),
            },
        }


def fit_calibration(
    model: CMT,
    sets: Sequence[tuple[Embedded, LearntPeople]],
    dataset: DatasetName,
    *,
    prior: float = 0.5,
    progress: Callable[[str], None] = lambda _: None,
) -> Fit:
    """Fit on all sets together, and judge by sets, or by halves of the people of one.

    model: gets the chosen strength. sets: held-out images of both modalities, and who is on them.
    dataset: layout of all sets, whose protocol leaves pairs out. prior: share of pairs of one
    person that similarities assume. progress: told what is being fitted.
    Raises DatasetError where a modality is missing, fewer than four people have pairs across both,
    or a fit is stuck.
    """
    held_out = together([embedded for embedded, _ in sets], dataset)
    maker = PairMaker(model, held_out)
    check_people(maker)
    progress("the strength of the modulation")
    strength = choose_strength(model, held_out)
    model.strength = strength.chosen
    curves = fit_curves(maker, prior, progress)
    references = {modality: maker.references(modality) for modality in MODALITIES}
    ranking = fit_ranking(model, held_out, references, progress)
    left_out = list(curves.left_out)
    if not strength.enough:
        left_out.append("At no strength does modulation change enough of the answers.")
    if ranking is None:
        left_out.append("No probability of answers: too few people have images on both sides.")
    facts = CalibrationFacts(
        prior=prior,
        people=tuple(people for _, people in sets),
        maps=tuple(curves.maps),
        strength=strength.chosen,
        ranking=None if ranking is None else ranking.facts,
    )
    calibration = Calibration(facts, references, model.config.metric)
    return Fit(calibration, strength, curves.reliabilities, ranking, left_out)
