"""How probable it is that the person asked for is who an answer shows, or is not enrolled at all.

For labelled items the people searched and "not enrolled" are the outcomes, exactly one of which is
true. With s_p the score of person p's best image, n images searched, a share o of which is of the
query's own modality, and equal odds of being enrolled:

    ln w_p = a·s_p − b − c·ln n − m·o − r·Δ
    P(p) = w_p / (1 + Σ w),    P(not enrolled) = 1 / (1 + Σ w)

Another prior π multiplies every weight by π/(1 − π). The slope a follows how widely the query's
distances in this gallery spread, against its distances to the checkpoint's references, so that an
absolute distance still counts after scores were scaled by the gallery's own deviation. Images and
not people are counted, since the best of four images of a stranger looks better than that of one;
and within a modality strangers look more alike than across, against the deviation of all. Δ is by
how much re-ranking raised the best score: it raises whoever is nearest, enrolled or not, so that it
says who of these people it is rather than whether it is any of them.

Unlabelled items do not exclude each other, since a person may have several: each has a weight from
a fit of its own, with P = w / (1 + w), and "enrolled" has the odds of all weights together.

Not every person searched is scored. What lies beyond a shortlist is counted as the tail of a normal
distribution that has as many items beyond the shortlist's last score as there are: one says thus
the same of the first whether a hundred items are scored or all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from model.ranking.facts import PosteriorFit
from model.ranking.scores import FloatArray

_NORMAL = NormalDist()
_LOWEST = -745.0  # exp of anything lower is 0


@dataclass(frozen=True)
class Beyond:
    """The items of one modality that were not scored.

    searched: all items of the modality. scored: those with the best scores, which were. last: the
    lowest score of these.
    """

    searched: int
    scored: int
    last: float


@dataclass(frozen=True)
class Searched:
    """What a query was compared with.

    people: distinct people, each unlabelled item counting as one. items: all items. unlabelled:
    those without a label. own: the share of the items that is of the query's modality, see
    `model.ranking.search.own_share`. ratio: of the deviation of the query's distances here to that
    of its distances to the references. images: of the query, K. beyond: what was not scored, by
    modality. raised: by how much re-ranking raised the best score of all.
    """

    people: int
    items: int
    unlabelled: int
    own: float
    ratio: float = 1.0
    images: int = 1
    beyond: Sequence[Beyond] = field(default_factory=list)
    raised: float = 0.0


@dataclass(frozen=True)
class Answer:
    """probabilities: of each item scored. enrolled: that the person is among what was searched."""

    probabilities: FloatArray
    enrolled: float


def posterior(
    scores: FloatArray,
    people: npt.NDArray[np.int64],
    searched: Searched,
    *,
    labelled: PosteriorFit,
    unlabelled: PosteriorFit,
    prior: float = 0.5,
    counted: npt.NDArray[np.bool_] | None = None,
) -> Answer:
    """Scores of N items and whose they are → the probabilities of the answer.

    people: equal for the items of one person, negative for an item without a label. All images of
    a person get the same probability, that of the best one.
    labelled, unlabelled: the fits for these searches. prior: that the person is enrolled, in
    (0, 1). counted: which items are outcomes of their own, all by default; the others, which have
    no better scores, are among what `Searched.beyond` stands for.
    """
    prior_odds = math.log(prior) - math.log1p(-prior)
    named = people >= 0
    weights = np.empty(len(scores))
    weights[~named] = prior_odds + log_weights(scores[~named], unlabelled, searched)
    sure = np.ones(len(scores), np.bool_) if counted is None else counted
    # A person's best item comes first, before all that are no outcomes.
    order = np.flatnonzero(named)
    order = order[np.lexsort((-scores[order], ~sure[order], people[order]))]
    whose = people[order]
    first = np.ones(len(order), np.bool_)
    np.not_equal(whose[1:], whose[:-1], out=first[1:])
    best = order[first]
    outcomes = sure[best]
    of_people = prior_odds + log_weights(scores[best], labelled, searched)
    weights[order] = of_people[np.cumsum(first) - 1]

    alone = searched.unlabelled
    share = (searched.people - alone) / max(1, searched.items - alone)  # people for each item
    rest_named = _rest(searched, labelled) + _log(share * (searched.items - alone) / searched.items)
    rest_alone = _rest(searched, unlabelled) + _log(alone / searched.items)
    all_named = _log_sum(np.append(of_people[outcomes], prior_odds + rest_named))
    everything = _log_sum(np.append(weights[~named & sure], [all_named, prior_odds + rest_alone]))
    against = np.where(named, weights - np.logaddexp(0, all_named), -np.logaddexp(0, -weights))
    enrolled = math.exp(-np.logaddexp(0, -everything))
    return Answer(np.minimum(np.exp(np.minimum(against, 0)), enrolled), enrolled)


def log_weights(scores: FloatArray, fit: PosteriorFit, searched: Searched) -> FloatArray:
    """Scores → ln w at even odds of being enrolled."""
    offset = fit.offset + fit.size * math.log(max(1, searched.items)) + fit.own * searched.own
    return slope(fit, searched) * scores - offset - fit.raised * searched.raised


def slope(fit: PosteriorFit, searched: Searched) -> float:
    """By how much ln w rises with each unit of score."""
    return float(fit.slope * searched.ratio**fit.spread * searched.images**fit.images)


def _rest(searched: Searched, fit: PosteriorFit) -> float:
    """ln of the weights of all items that were not scored, as if each were somebody."""
    steep = slope(fit, searched)
    masses = [_tail(beyond, steep) for beyond in searched.beyond]
    return float(log_weights(np.array([0.0]), fit, searched)[0]) + _log_sum(masses)


def _tail(beyond: Beyond, steep: float) -> float:
    """ln Σ exp(steep · score) over what is not scored: see the module."""
    left = beyond.searched - beyond.scored
    if left <= 0:
        return -math.inf
    if beyond.scored == 0:
        return math.log(left) + steep**2 / 2
    place = -_NORMAL.inv_cdf(beyond.scored / beyond.searched)  # of `last` in a standard normal
    deviation = beyond.last / place if place > 0 and beyond.last > 0 else 1.0
    # Half of the items or more are scored, or the last is no better than the mean: no tail to
    # follow. None can weigh more than the last.
    most = math.log(left) + steep * beyond.last
    reach = steep * deviation
    mass = math.log(beyond.searched) + reach**2 / 2 + _log(_NORMAL.cdf(place - reach))
    return min(most, mass)


def _log(number: float) -> float:
    return math.log(number) if number > 0 else -math.inf


def _log_sum(logs: FloatArray | Sequence[float]) -> float:
    """ln Σ exp, −∞ for none."""
    array = np.asarray(logs, np.float64)
    largest = array.max(initial=-math.inf)
    if not math.isfinite(largest):
        return -math.inf
    return float(largest + math.log(np.exp(np.maximum(array - largest, _LOWEST)).sum()))
