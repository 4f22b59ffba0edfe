"""Choose and fit the curves of a checkpoint, cross-fitted over people.

People are halved at random, a curve is fitted on the pairs within one half and judged on those
within the other, and the other way round; pairs across the halves belong to neither, so that
nobody is on both sides. Five halvings, because one leaves out half of the pairs of two people, and
which of them look alike decides the rare false accepts (Dietterich's 5×2 cross-validation, Neural
Computation 1998). What is stored is fitted on all pairs.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from model import CMT, Calibration
from model.calibration import (
    NORMALISATIONS,
    CalibrationFacts,
    CalibrationMap,
    Candidate,
    FloatArray,
    Normalisation,
    Threshold,
    normalised,
)
from model.config import MODALITIES
from training.calibration.curves import (
    FITS,
    Curve,
    Method,
    Reliability,
    accept_above,
    log_loss,
    reliability,
)
from training.calibration.pairs import PairMaker, Pairs
from training.datasets import DatasetError, DatasetName
from training.evaluation.embedding import Embedded
from training.evaluation.metrics import BoolArray, IntArray

HALVINGS = 5
FEWEST_PEOPLE = 4  # two halves of two people: one person has no pair with another
FALSE_ACCEPT_RATES = (0.01, 0.001)


@dataclass(frozen=True)
class Fit:
    """A calibration and what only reports need.

    Attributes:
        calibration: to store in the checkpoint.
        reliabilities: cross-fitted, one for each of its maps.
        left_out: a sentence for each modality pair that has no curve.
    """

    calibration: Calibration
    reliabilities: list[Reliability]
    left_out: list[str]

    def to_json(self) -> dict[str, Any]:
        """The facts with the reliability diagram of each curve; empty bins are null."""
        facts = self.calibration.facts.model_dump(mode="json")
        for entry, diagram in zip(facts["maps"], self.reliabilities, strict=True):
            entry["reliability"] = {
                "predicted": [None if math.isnan(v) else v for v in diagram.predicted.tolist()],
                "observed": [None if math.isnan(v) else v for v in diagram.observed.tolist()],
                "positives": diagram.positives.tolist(),
                "negatives": diagram.negatives.tolist(),
            }
        facts["references"] = {m: len(rows) for m, rows in self.calibration.references.items()}
        return facts | {"left_out": self.left_out}


def fit_calibration(
    model: CMT,
    embedded: Embedded,
    dataset: DatasetName,
    *,
    prior: float = 0.5,
    progress: Callable[[str], None] = lambda _: None,
) -> Fit:
    """Fit a curve for every modality pair, modulated and unmodulated.

    Each is the normalisation and method of the least cross-fitted log loss. Pairs within a
    modality get none where the set has too few of one person (RegDB's layout allows one image a
    modality); across modalities they must be there.

    Args:
        model: whose γ, β and metric count.
        embedded: held-out images, of both modalities.
        dataset: whose protocol leaves pairs out.
        prior: share of pairs of one person that the probabilities assume.
        progress: told what is being fitted.

    Raises:
        DatasetError: a modality is missing, or fewer than four people have pairs across both.
    """
    maker = PairMaker(model, embedded, dataset)
    identities = sorted({sample.person_id for sample in embedded.samples})
    maps: list[CalibrationMap] = []
    reliabilities: list[Reliability] = []
    left_out: list[str] = []
    for query, gallery in product(MODALITIES, MODALITIES):
        for modulated in (True, False):
            progress(f"{query} → {gallery}, {'modulated' if modulated else 'unmodulated'}")
            pairs = maker.pairs(query, gallery, modulated=modulated)
            people = np.unique(pairs.query_people[(pairs.same & pairs.counted).any(axis=1)])
            if people.size < FEWEST_PEOPLE:
                sentence = (
                    f"{people.size} of the {len(identities)} identities have pairs of their own "
                    f"{query} and {gallery} images"
                )
                if query != gallery:
                    raise DatasetError(
                        f"Calibration needs at least {FEWEST_PEOPLE} identities seen by both kinds "
                        f"of cameras, but {sentence}; name more with --ids."
                    )
                left_out.append(f"No curve for {query} → {gallery}: only {sentence}.")
                break
            fitted, diagram = _fit_map(pairs, people, prior)
            maps.append(CalibrationMap(query=query, gallery=gallery, modulated=modulated, **fitted))
            reliabilities.append(diagram)
    facts = CalibrationFacts(
        prior=prior,
        dataset=dataset.value,
        identities=tuple(identities),
        maps=tuple(maps),
    )
    return Fit(Calibration(facts, maker.references, model.config.metric), reliabilities, left_out)


@dataclass(frozen=True)
class _Folds:
    """Counted pairs by fold: in fold k, `trained[k]` and `held_out[k]` index them.

    Two folds a halving, each half being trained on once.
    """

    same: BoolArray
    trained: list[IntArray]
    held_out: list[IntArray]


@dataclass(frozen=True)
class _CrossFit:
    """One form on all folds: each fold's curve, and its answers for the people held out."""

    normalisation: Normalisation
    method: Method
    scores: FloatArray  # of all counted pairs
    curves: list[Curve]
    probabilities: FloatArray  # of the held-out pairs, fold after fold
    same: BoolArray
    log_loss: float


def _fit_map(pairs: Pairs, people: IntArray, prior: float) -> tuple[dict[str, Any], Reliability]:
    """Fields of a `CalibrationMap`, and the cross-fitted diagram of the chosen form."""
    folds = _split(pairs, people)
    compared = []
    for normalisation in NORMALISATIONS:
        scores = normalised(pairs.distance, pairs.reference, normalisation)[pairs.counted]
        compared += [_cross_fit(scores, folds, normalisation, method, prior) for method in FITS]
    compared.sort(key=lambda form: form.log_loss)
    best = compared[0]
    curve = FITS[best.method](best.scores, folds.same, prior)
    diagram = reliability(best.probabilities, best.same, prior)
    final = curve(best.scores)
    return {
        "normalisation": best.normalisation,
        "curve": curve,
        "positives": int(folds.same.sum()),
        "negatives": int((~folds.same).sum()),
        "identities": people.size,
        "log_loss": best.log_loss,
        "log_loss_of_prior": -prior * math.log(prior) - (1 - prior) * math.log(1 - prior),
        "expected_calibration_error": diagram.error,
        "thresholds": tuple(_threshold(final, folds, best, rate) for rate in FALSE_ACCEPT_RATES),
        "candidates": tuple(
            Candidate(normalisation=form.normalisation, method=form.method, log_loss=form.log_loss)
            for form in compared
        ),
    }, diagram


def _split(pairs: Pairs, people: IntArray) -> _Folds:
    """Halve those with pairs of their own and the others each: both halves have some of either."""
    generator = random.Random(0)
    everyone = np.union1d(pairs.query_people, pairs.gallery_people)
    rows, columns = np.nonzero(pairs.counted)
    of_query, of_gallery = pairs.query_people[rows], pairs.gallery_people[columns]
    trained, held_out = [], []
    for _ in range(HALVINGS):
        shuffled = [
            person
            for group in (people, np.setdiff1d(everyone, people))
            for person in generator.sample(group.tolist(), group.size)
        ]
        query_side, gallery_side = (np.isin(side, shuffled[::2]) for side in (of_query, of_gallery))
        first = np.flatnonzero(query_side & gallery_side)
        second = np.flatnonzero(~query_side & ~gallery_side)
        trained += [first, second]
        held_out += [second, first]
    return _Folds(pairs.same[pairs.counted], trained, held_out)


def _cross_fit(
    scores: FloatArray, folds: _Folds, normalisation: Normalisation, method: Method, prior: float
) -> _CrossFit:
    curves = [FITS[method](scores[pairs], folds.same[pairs], prior) for pairs in folds.trained]
    held_out = zip(curves, folds.held_out, strict=True)
    probabilities = np.concatenate([curve(scores[pairs]) for curve, pairs in held_out])
    same = folds.same[np.concatenate(folds.held_out)]
    loss = log_loss(probabilities, same, prior)
    return _CrossFit(normalisation, method, scores, curves, probabilities, same, loss)


def _threshold(final: FloatArray, folds: _Folds, form: _CrossFit, rate: float) -> Threshold:
    """From all pairs, and what such a threshold does for people who had no part in it."""
    accepted, same = [], []
    for curve, trained, held_out in zip(form.curves, folds.trained, folds.held_out, strict=True):
        limit = accept_above(curve(form.scores[trained]), folds.same[trained], rate)
        if limit is not None:
            accepted.append(curve(form.scores[held_out]) > limit)
            same.append(folds.same[held_out])
    complete = len(accepted) == len(folds.trained)  # else some half has too few pairs to tell
    similarity = accept_above(final, folds.same, rate)
    if not complete:
        return Threshold(false_accept_rate=rate, similarity=similarity)
    yes, truth = np.concatenate(accepted), np.concatenate(same)
    return Threshold(
        false_accept_rate=rate,
        similarity=similarity,
        measured_false_accept_rate=float(yes[~truth].mean()),
        true_accept_rate=float(yes[truth].mean()),
    )
