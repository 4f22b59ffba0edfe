"""Fit the weights of answers against "not enrolled" by maximum likelihood, see
`model.ranking.posterior`.

Several starts must end alike: one that is stuck says probabilities that look like any others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from model.calibration import FloatArray
from model.ranking import PosteriorFit
from training.calibration.curves import Reliability, reliability
from training.calibration.searches import KINDS, Scored
from training.datasets import DatasetError
from training.evaluation.metrics import BoolArray, IntArray

_NOTHING = -1e4  # a score that weighs nothing
# ln slope, spread, images, offset, size, own, raised
STARTS = (
    (0.7, 0.0, 0.0, 3.0, 1.0, 0.0, 1.0),
    (0.0, 1.0, 0.0, 1.0, 0.5, 0.0, 0.0),
    (1.2, 1.0, 0.0, 6.0, 1.0, 0.5, 1.0),
)
_SHAPES = 3  # of the parameters, those of the slope come first
STEPS = 500  # of a fit, far more than it needs
_LOOSE = 3.0  # deviation of a weak normal prior about the first start: few searches stay finite
_SAME = 1e-4  # nats by which the losses of two starts may differ


@dataclass(frozen=True)
class Batch:
    """B searches as numbers.

    scores: B×M, the best of each person where labelled, else of each item. truth: the column of the
    person asked for, −1 where absent; unlabelled: of the first where it is right, else −1.
    present: whether the person is there at all. shapes: B×3, ln ratio and ln images for the slope
    follow 1; offsets: B×4, 1, ln items, share of the query's own modality, what re-ranking raised.
    """

    labelled: bool
    scores: FloatArray
    first: IntArray
    right: BoolArray
    truth: IntArray
    present: BoolArray
    shapes: FloatArray
    offsets: FloatArray

    def chosen(self, rows: BoolArray) -> Batch:
        """Some of the searches."""
        of_each = {name: value[rows] for name, value in vars(self).items() if name != "labelled"}
        return Batch(labelled=self.labelled, **of_each)


def batch_of(found: Sequence[Scored], *, labelled: bool) -> Batch:
    """The searches in the form that they are fitted in."""
    of_each = [_columns(one, labelled=labelled) for one in found]
    scores = np.full((len(found), max(len(s) for s, _ in of_each)), _NOTHING)
    truth = np.full(len(found), -1)
    right = np.zeros(len(found), np.bool_)
    first = np.zeros(len(found), np.int64)
    for row, (values, owners) in enumerate(of_each):
        scores[row, : len(values)] = values
        first[row] = values.argmax()
        asked = found[row].search.asked
        right[row] = owners[first[row]] == asked
        if found[row].search.present and labelled:
            truth[row] = np.flatnonzero(owners == asked)[0]
    searched = [one.searched(labelled=labelled) for one in found]
    shapes = [[1, math.log(one.ratio), math.log(one.images)] for one in searched]
    offsets = [[1, math.log(one.items), one.own, one.raised] for one in searched]
    return Batch(
        labelled=labelled,
        scores=scores,
        first=first,
        right=right,
        truth=truth,
        present=np.array([one.search.present for one in found]),
        shapes=np.array(shapes, np.float64),
        offsets=np.array(offsets, np.float64),
    )


def _columns(one: Scored, *, labelled: bool) -> tuple[FloatArray, IntArray]:
    if not labelled:
        return one.scores, one.people
    owners, whose = np.unique(one.people, return_inverse=True)
    best = np.full(owners.size, _NOTHING)
    np.maximum.at(best, whose, one.scores)
    return best, owners


def loss(parameters: FloatArray, batch: Batch) -> tuple[float, FloatArray]:
    """Mean −ln of the probability given to the truth [nats], and its gradient."""
    values, by_slope, by_logit = _terms(parameters, batch)
    gradient = np.concatenate([by_slope @ batch.shapes, -(by_logit @ batch.offsets)])
    return float(values.mean()), gradient / len(values)


def losses(parameters: FloatArray, batch: Batch) -> FloatArray:
    """−ln of the probability given to the truth by each answer [nats].

    Unlabelled: the mean of that given to the first being right or wrong, and that given to the
    person being enrolled or not.
    """
    return _terms(parameters, batch)[0]


def _logits(parameters: FloatArray, batch: Batch) -> tuple[FloatArray, FloatArray]:
    """ln w of each column, and the slope of each row."""
    slopes = np.exp(batch.shapes @ parameters[:_SHAPES])
    offsets = batch.offsets @ parameters[_SHAPES:]
    return slopes[:, None] * batch.scores - offsets[:, None], slopes


def _terms(parameters: FloatArray, batch: Batch) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Losses, and their derivatives by ln slope and by all logits of a row together."""
    logits, slopes = _logits(parameters, batch)
    top = np.maximum(logits.max(axis=1), 0)
    weights = np.exp(logits - top[:, None])
    total = weights.sum(axis=1)
    scores = np.einsum("bm,bm->b", weights, batch.scores)  # Σ w·s
    rows = np.arange(len(logits))
    if batch.labelled:
        whole = np.exp(-top) + total  # 1 + Σ w
        there, column = batch.truth >= 0, np.maximum(batch.truth, 0)
        values = top + np.log(whole) - np.where(there, logits[rows, column], 0)
        by_slope = scores / whole - np.where(there, batch.scores[rows, column], 0)
        return values, by_slope * slopes, total / whole - there
    enrolled = top + np.log(total)  # ln Σ w, whose odds those of "enrolled" are
    first, score = logits[rows, batch.first], batch.scores[rows, batch.first]
    values = np.logaddexp(0, first) - batch.right * first
    values = (values + np.logaddexp(0, enrolled) - batch.present * enrolled) / 2
    of_first = (_sigmoid(first) - batch.right) / 2
    of_all = (_sigmoid(enrolled) - batch.present) / 2
    by_slope = of_first * score + of_all * scores / total
    return values, by_slope * slopes, of_first + of_all


def _sigmoid(logits: FloatArray) -> FloatArray:
    return np.asarray((1 + np.tanh(logits / 2)) / 2)


def fitted(batch: Batch, starts: Sequence[Sequence[float]] = STARTS) -> FloatArray:
    """The parameters of least loss. Raises DatasetError where the starts do not end alike."""
    center = np.array(STARTS[0])

    def objective(parameters: FloatArray) -> tuple[float, FloatArray]:
        value, gradient = loss(parameters, batch)
        away = (parameters - center) / _LOOSE
        size = len(batch.scores)
        return value + float(away @ away) / (2 * size), gradient + away / (_LOOSE * size)

    ends = [
        minimize(
            objective, np.array(start), jac=True, method="L-BFGS-B", options={"maxiter": STEPS}
        )
        for start in starts
    ]
    best = min(ends, key=lambda end: end.fun)
    if not np.isfinite(best.x).all() or max(end.fun for end in ends) - best.fun > _SAME:
        losses = ", ".join(f"{end.fun:.4f}" for end in ends)
        raise DatasetError(
            f"The fit of probabilities ends at other losses from other starts ({losses}); name "
            "more people with --ids."
        )
    found: FloatArray = best.x
    return found


def first_probability(parameters: FloatArray, batch: Batch) -> FloatArray:
    """That the first of each answer is right."""
    logits, _ = _logits(parameters, batch)
    first = logits.max(axis=1)
    if not batch.labelled:
        return _sigmoid(first)
    top = np.maximum(first, 0)
    whole = np.exp(-top) + np.exp(logits - top[:, None]).sum(axis=1)
    found: FloatArray = np.exp(first - top) / whole
    return found


@dataclass(frozen=True)
class Figures:
    """Of answers by people who were not in the fit, means over the folds.

    log_loss: nats an answer, see `losses`. error: of the first's probability, in ten equal bins.
    chance: the error that true probabilities would have on as many answers, by chance alone.
    right: share of first answers that are. probability: their mean. searches: how many.
    """

    log_loss: float
    error: float
    chance: float
    right: float
    probability: float
    searches: int


@dataclass(frozen=True)
class Judged:
    """A fit, and by cross-validation how true it is.

    by_kind: of all searches, and of those of a kind. reliability: of the first answers of all.
    """

    fit: PosteriorFit
    by_kind: dict[str, Figures]
    reliability: Reliability


def fit_posterior(
    folds: Sequence[Sequence[Scored]], *, modulated: bool, reranked: bool, labelled: bool
) -> Judged:
    """Fit on the searches of all folds, and judge fits on all folds but one by that one.

    Raises DatasetError where the fit is stuck.
    """
    everything = [one for fold in folds for one in fold]
    batch = batch_of(everything, labelled=labelled)
    fold_of = np.repeat(np.arange(len(folds)), [len(fold) for fold in folds])
    probabilities, given = np.empty(len(everything)), np.empty(len(everything))
    for number in range(len(folds)):
        mine = fold_of == number
        parameters = fitted(batch.chosen(~mine), STARTS[:1])
        own = batch.chosen(mine)
        probabilities[mine] = first_probability(parameters, own)
        given[mine] = losses(parameters, own)
    kinds = {"all": np.ones(len(everything), np.bool_)}
    for kind in KINDS:
        kinds[kind] = np.array([kind in one.search.kinds for one in everything])
    by_kind = {
        kind: _figures(chosen, fold_of, probabilities, given, batch.right)
        for kind, chosen in kinds.items()
        if chosen.any()
    }
    slope, spread, images, offset, size, own_share, raised = fitted(batch).tolist()
    fit = PosteriorFit(
        modulated=modulated,
        reranked=reranked,
        labelled=labelled,
        slope=math.exp(slope),
        spread=spread,
        images=images,
        offset=offset,
        size=size,
        own=own_share,
        raised=raised,
        log_loss=by_kind["all"].log_loss,
        error=by_kind["all"].error,
        searches=len(everything),
    )
    return Judged(fit, by_kind, reliability(probabilities, batch.right, None))


def _figures(
    chosen: BoolArray,
    fold_of: IntArray,
    probabilities: FloatArray,
    given: FloatArray,
    right: BoolArray,
) -> Figures:
    """Of the chosen searches."""
    parts = [chosen & (fold_of == number) for number in np.unique(fold_of[chosen])]

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    return Figures(
        log_loss=mean([given[part].mean() for part in parts]),
        error=mean([reliability(probabilities[part], right[part], None).error for part in parts]),
        chance=mean([_chance(probabilities[part]) for part in parts]),
        right=mean([right[part].mean() for part in parts]),
        probability=mean([probabilities[part].mean() for part in parts]),
        searches=int(chosen.sum()),
    )


def _chance(probabilities: FloatArray, draws: int = 20) -> float:
    generator = np.random.default_rng(0)
    errors = [
        reliability(probabilities, generator.random(probabilities.size) < probabilities, None).error
        for _ in range(draws)
    ]
    return float(np.mean(errors))
