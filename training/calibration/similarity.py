"""Distance → similarity: choose and fit the curves of a checkpoint, cross-fitted over people.

People are halved at random, a curve is fitted on the pairs within one half and judged on those
within the other, and the other way round; pairs across the halves belong to neither, so that
nobody is on both sides. Five halvings, because one leaves out half of the pairs of two people, and
which of them look alike decides the rare false accepts (Dietterich's 5×2 cross-validation, Neural
Computation 1998).

The pairs of a half are normalised by reference images of the other half. References of the same
people would carry who of them looks like whom, which those of a service's gallery never do: scores
would look better than they are, and more so the more a normalisation relies on the references.
What is stored has references of everybody, and a curve fitted on the pairs of all halves.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from model import Modality
from model.calibration import (
    NORMALISATIONS,
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
from training.datasets import DatasetError
from training.evaluation.metrics import BoolArray, IntArray

HALVINGS = 5
FEWEST_PEOPLE = 4  # two halves of two people: one person has no pair with another
FALSE_ACCEPT_RATES = (0.01, 0.001)


@dataclass(frozen=True)
class Curves:
    """Curves of a checkpoint.

    reliabilities: cross-fitted, one for each of the maps.
    left_out: a sentence for each modality pair that has no curve.
    """

    maps: list[CalibrationMap]
    reliabilities: list[Reliability]
    left_out: list[str]


def check_people(maker: PairMaker) -> None:
    """Raise DatasetError where fewer than four people have pairs across both modalities."""
    for query, gallery in product(MODALITIES, MODALITIES):
        if query != gallery and len(_paired(maker.pairs(query, gallery, modulated=False))) < (
            FEWEST_PEOPLE
        ):
            raise DatasetError(
                f"Calibration needs at least {FEWEST_PEOPLE} identities seen by both kinds of "
                f"cameras, but {_few(maker, query, gallery)}; name more with --ids."
            )


def fit_curves(
    maker: PairMaker, prior: float, progress: Callable[[str], None] = lambda _: None
) -> Curves:
    """Fit a curve for every modality pair, modulated and unmodulated.

    Each is the normalisation and method of the least cross-fitted log loss. A pair of modalities
    of which the people have too few pairs gets none (a single image of each in one, say).

    prior: share of pairs of one person that the probabilities assume.
    progress: told what is being fitted.
    """
    found = Curves([], [], [])
    for query, gallery in product(MODALITIES, MODALITIES):
        for modulated in (True, False):
            progress(f"{query} → {gallery}, {'modulated' if modulated else 'unmodulated'}")
            pairs = maker.pairs(query, gallery, modulated=modulated)
            people = _paired(pairs)
            if people.size < FEWEST_PEOPLE:
                few = _few(maker, query, gallery)
                found.left_out.append(f"No curve for {query} → {gallery}: only {few}.")
                break
            fitted, diagram = _fit_map(pairs, people, prior)
            found.maps.append(
                CalibrationMap(query=query, gallery=gallery, modulated=modulated, **fitted)
            )
            found.reliabilities.append(diagram)
    return found


def _paired(pairs: Pairs) -> IntArray:
    """People who have pairs of their own."""
    return np.unique(pairs.query_people[(pairs.same & pairs.counted).any(axis=1)])


def _few(maker: PairMaker, query: Modality, gallery: Modality) -> str:
    people = _paired(maker.pairs(query, gallery, modulated=False)).size
    return (
        f"{people} of the {maker.identities} identities have pairs of their own {query} and "
        f"{gallery} images"
    )


@dataclass(frozen=True)
class _Half:
    """One half of the people: their pairs among themselves, and the references of the other half.

    queries, gallery, references: which of the Q, N and R of `Pairs` are used.
    counted: the pairs that count, queries×gallery.
    same: whether each counted pair is of one person.
    """

    queries: IntArray
    gallery: IntArray
    references: IntArray
    counted: BoolArray
    same: BoolArray

    def scores(self, pairs: Pairs, normalisation: Normalisation) -> FloatArray:
        """Of the counted pairs."""
        distance = pairs.distance[np.ix_(self.queries, self.gallery)]
        reference = pairs.reference[np.ix_(self.queries, self.references)]
        return normalised(distance, reference, normalisation)[self.counted]


@dataclass(frozen=True)
class _CrossFit:
    """One form on all halves: the curve of each, and what it says of the other half's pairs."""

    normalisation: Normalisation
    method: Method
    scores: list[FloatArray]  # of each half
    curves: list[Curve]  # fitted on each half
    probabilities: FloatArray  # of the halves' pairs, each by the curve of the other
    log_loss: float


def _fit_map(pairs: Pairs, people: IntArray, prior: float) -> tuple[dict[str, Any], Reliability]:
    """Fields of a `CalibrationMap`, and the cross-fitted diagram of the chosen form."""
    halves = _halves(pairs, people)
    same = np.concatenate([half.same for half in halves])
    compared = []
    for normalisation in NORMALISATIONS:
        scores = [half.scores(pairs, normalisation) for half in halves]
        compared += [_cross_fit(scores, halves, normalisation, m, prior) for m in FITS]
    compared.sort(key=lambda form: form.log_loss)
    best = compared[0]
    scores_of_all = np.concatenate(best.scores)
    curve = FITS[best.method](scores_of_all, same, prior)
    final = curve(scores_of_all)
    diagram = reliability(best.probabilities, same, prior)
    counted = pairs.same[pairs.counted]
    return {
        "normalisation": best.normalisation,
        "curve": curve,
        "positives": int(counted.sum()),
        "negatives": int((~counted).sum()),
        "identities": people.size,
        "log_loss": best.log_loss,
        "log_loss_of_prior": -prior * math.log(prior) - (1 - prior) * math.log(1 - prior),
        "expected_calibration_error": diagram.error,
        "thresholds": tuple(
            _threshold(accept_above(final, same, rate), halves, best, rate)
            for rate in FALSE_ACCEPT_RATES
        ),
        "candidates": tuple(
            Candidate(normalisation=form.normalisation, method=form.method, log_loss=form.log_loss)
            for form in compared
        ),
    }, diagram


def _halves(pairs: Pairs, people: IntArray) -> list[_Half]:
    """Five halvings, one half after the other: number k's other half is number k ^ 1.

    Those with pairs of their own and the others are halved apart: both halves have some of either.
    """
    generator = random.Random(0)
    everyone = np.union1d(pairs.query_people, pairs.gallery_people)
    halves = []
    for _ in range(HALVINGS):
        shuffled = [
            person
            for group in (people, np.setdiff1d(everyone, people))
            for person in generator.sample(group.tolist(), group.size)
        ]
        for chosen in (shuffled[::2], shuffled[1::2]):
            queries = np.flatnonzero(np.isin(pairs.query_people, chosen))
            gallery = np.flatnonzero(np.isin(pairs.gallery_people, chosen))
            counted = pairs.counted[np.ix_(queries, gallery)]
            halves.append(
                _Half(
                    queries=queries,
                    gallery=gallery,
                    references=np.flatnonzero(~np.isin(pairs.reference_people, chosen)),
                    counted=counted,
                    same=pairs.same[np.ix_(queries, gallery)][counted],
                )
            )
    return halves


def _cross_fit(
    scores: list[FloatArray],
    halves: list[_Half],
    normalisation: Normalisation,
    method: Method,
    prior: float,
) -> _CrossFit:
    curves = [
        FITS[method](values, half.same, prior) for values, half in zip(scores, halves, strict=True)
    ]
    probabilities = np.concatenate([curves[k ^ 1](values) for k, values in enumerate(scores)])
    same = np.concatenate([half.same for half in halves])
    loss = log_loss(probabilities, same, prior)
    return _CrossFit(normalisation, method, scores, curves, probabilities, loss)


def _threshold(
    similarity: float | None, halves: list[_Half], form: _CrossFit, rate: float
) -> Threshold:
    """The threshold, and what one from a half does to the pairs of the other."""
    accepted = []
    for k, (curve, values) in enumerate(zip(form.curves, form.scores, strict=True)):
        limit = accept_above(curve(values), halves[k].same, rate)
        if limit is None:  # this half has too few pairs to tell
            return Threshold(false_accept_rate=rate, similarity=similarity)
        accepted.append(curve(form.scores[k ^ 1]) > limit)
    yes = np.concatenate(accepted)
    truth = np.concatenate([halves[k ^ 1].same for k in range(len(halves))])
    return Threshold(
        false_accept_rate=rate,
        similarity=similarity,
        measured_false_accept_rate=float(yes[~truth].mean()),
        true_accept_rate=float(yes[truth].mean()),
    )
