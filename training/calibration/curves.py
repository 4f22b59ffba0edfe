"""Scores and labels of pairs → a curve to probabilities, and what measures one.

Pairs of one person are far fewer than pairs of two. Everything here weights them so that both
together have the stated prior: a pair of one person counts prior / positives, one of two people
(1 − prior) / negatives, whatever the held-out set happens to hold.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize
from sklearn.isotonic import IsotonicRegression

from model.calibration import FloatArray, IsotonicCurve, LogisticCurve
from training.evaluation.metrics import BoolArray, IntArray

Method = Literal["logistic", "isotonic"]
Curve = LogisticCurve | IsotonicCurve

# A step of an isotonic curve can hold pairs of one kind only. Nothing measured on a few thousand
# people is certain, and one wrong certain answer would make its log loss infinite.
CERTAINTY = 0.999
BINS = 10


def pair_weights(same: BoolArray, prior: float) -> FloatArray:
    """Weights that sum to 1, those of pairs of one person to `prior`; both kinds must be there."""
    positives = int(same.sum())
    return np.where(same, prior / positives, (1 - prior) / (same.size - positives))


def fit_logistic(scores: FloatArray, same: BoolArray, prior: float) -> LogisticCurve:
    """Platt's scaling, with his targets, which stay finite where no pair is on the wrong side.

    Platt, "Probabilistic Outputs for Support Vector Machines", 1999. The slope is kept from rising
    with the distance: a network that knows nothing then gets a flat curve.
    """
    weights = pair_weights(same, prior)
    positives = int(same.sum())
    negatives = same.size - positives
    targets = np.where(same, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    center, scale = float(scores.mean()), float(scores.std()) or 1.0
    standard = (scores - center) / scale

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        logits = parameters[0] * standard + parameters[1]
        value = float(weights @ (np.logaddexp(0, logits) - targets * logits))
        error = weights * ((1 + np.tanh(logits / 2)) / 2 - targets)
        return value, np.array([error @ standard, error.sum()])

    start = np.array([0.0, np.log(prior / (1 - prior))])
    found = minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(None, 0), (None, None)],
        options={"ftol": 1e-13, "gtol": 1e-9},
    )
    slope = min(0.0, float(found.x[0]) / scale)
    return LogisticCurve(slope=slope, intercept=float(found.x[1]) - slope * center)


def fit_isotonic(scores: FloatArray, same: BoolArray, prior: float) -> IsotonicCurve:
    """The best non-increasing steps (pool adjacent violators), joined by straight lines."""
    fitted = IsotonicRegression(
        increasing=False, y_min=1 - CERTAINTY, y_max=CERTAINTY, out_of_bounds="clip"
    ).fit(scores, same.astype(np.float64), sample_weight=pair_weights(same, prior))
    return IsotonicCurve(
        scores=tuple(fitted.X_thresholds_.tolist()),
        probabilities=tuple(fitted.y_thresholds_.tolist()),
    )


FITS: dict[Method, Callable[[FloatArray, BoolArray, float], Curve]] = {
    "logistic": fit_logistic,
    "isotonic": fit_isotonic,
}


def log_loss(probabilities: FloatArray, same: BoolArray, prior: float) -> float:
    """−ln of the probability that was given to the truth, mean over pairs of this prior, in nats.

    At a prior of ½ and divided by ln 2 this is the C_llr of speaker verification (Brümmer and
    du Preez 2006).
    """
    given = np.where(same, probabilities, 1 - probabilities)
    smallest = np.finfo(np.float64).tiny
    return float(-pair_weights(same, prior) @ np.log(np.maximum(given, smallest)))


@dataclass(frozen=True)
class Reliability:
    """Predicted against observed in ten equal bins of predicted probability.

    predicted: mean prediction in each bin, pairs weighted to the prior; NaN in an empty one.
    observed: share of pairs of one person there, weighted alike.
    positives, negatives: pairs of one and of two people there.
    error: expected calibration error, the mean of |predicted − observed| over the weight.
    """

    predicted: FloatArray
    observed: FloatArray
    positives: IntArray
    negatives: IntArray
    error: float

    def to_json(self) -> dict[str, Any]:
        """The diagram as plain values; empty bins are null."""
        return {
            "predicted": [None if math.isnan(v) else v for v in self.predicted.tolist()],
            "observed": [None if math.isnan(v) else v for v in self.observed.tolist()],
            "positives": self.positives.tolist(),
            "negatives": self.negatives.tolist(),
        }


def reliability(probabilities: FloatArray, same: BoolArray, prior: float | None) -> Reliability:
    """Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), weighted to the prior.

    prior: None for answers, each of which counts as one.
    """
    weights = np.full(same.size, 1 / same.size) if prior is None else pair_weights(same, prior)
    bins = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)

    def total(values: FloatArray) -> FloatArray:
        return np.bincount(bins, weights=values, minlength=BINS).astype(np.float64)

    mass = total(weights)
    predicted, observed = total(weights * probabilities), total(weights * same)
    with np.errstate(invalid="ignore"):
        return Reliability(
            predicted=predicted / mass,
            observed=observed / mass,
            positives=total(same.astype(np.float64)).astype(np.int64),
            negatives=total((~same).astype(np.float64)).astype(np.int64),
            error=float(np.abs(predicted - observed).sum()),
        )


def accept_above(probabilities: FloatArray, same: BoolArray, rate: float) -> float | None:
    """The similarity above which at most `rate` of the pairs of two people lie.

    None where they are too few to tell: less than one of them would be accepted.
    """
    negatives = probabilities[~same]
    allowed = int(rate * negatives.size + 1e-9)
    if allowed < 1:
        return None
    # The (allowed + 1)-th largest: strictly above it are `allowed` or, with ties, fewer.
    return float(np.partition(negatives, negatives.size - allowed - 1)[-allowed - 1])
