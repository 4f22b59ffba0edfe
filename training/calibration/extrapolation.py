"""What probabilities say in galleries far larger than any that they were fitted on.

A gallery of n strangers is drawn from the distances of a query to the held-out strangers, each with
a little normal noise (a smoothed bootstrap, Silverman's width), so that the nearest of a million is
nearer than the nearest of a thousand. It cannot know strangers who look more alike than any two
held-out people: real galleries can be harder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.calibration import FloatArray
from model.ranking import DEPTH, Beyond, PosteriorFit, Searched, combined, posterior
from training.calibration.curves import reliability
from training.calibration.searches import Fold, Scored

SIZES = (100, 10_000, 1_000_000)


@dataclass(frozen=True)
class Extrapolated:
    """Galleries of one size, each item a person: the first answer, half of them not enrolled.

    right: share of right ones. probability: their mean. error: of it, in ten equal bins. enrolled:
    mean of `probability_enrolled`, which should be a half.
    """

    items: int
    searches: int
    right: float
    probability: float
    error: float
    enrolled: float


def extrapolate(
    folds: Sequence[Fold],
    fit: PosteriorFit,
    prior_items: float,
    *,
    modulated: bool,
    sizes: Sequence[int] = SIZES,
    count: int = 50,
) -> list[Extrapolated]:
    """Searches of one modality for the other, `count` of each fold, of which the best 100 are
    scored and the others counted by the tail, as in a service."""
    found = []
    for size in sizes:
        generator = np.random.default_rng(size)
        rows = [
            _search(fold, one, fit, prior_items, size, generator, modulated=modulated)
            for fold in folds
            for one in _across(fold, prior_items, count, modulated=modulated)
        ]
        if not rows:
            continue
        probabilities, right, enrolled = (np.array(column) for column in zip(*rows, strict=True))
        found.append(
            Extrapolated(
                items=size,
                searches=len(rows),
                right=float(right.mean()),
                probability=float(probabilities.mean()),
                error=reliability(probabilities, right, None).error,
                enrolled=float(enrolled.mean()),
            )
        )
    return found


def _across(fold: Fold, prior_items: float, count: int, *, modulated: bool) -> list[Scored]:
    found = fold.scored(prior_items, modulated=modulated)
    chosen = [one for one in found if one.search.kind in ("visible", "infrared")]
    order = np.random.default_rng(0).permutation(len(chosen))[:count]
    return [chosen[place] for place in order.tolist()]


def _search(
    fold: Fold,
    one: Scored,
    fit: PosteriorFit,
    prior_items: float,
    size: int,
    generator: np.random.Generator,
    *,
    modulated: bool,
) -> tuple[float, bool, float]:
    """The first's probability, whether it is right, and `probability_enrolled`."""
    search = one.search
    matrix, moments = fold.distances(modulated=modulated)
    row = matrix[search.query]
    strangers = row[(fold.modalities == search.gallery) & (fold.people != search.asked)]
    own = row[search.items[one.people == search.asked]]
    drawn = _smoothed(strangers, size - min(own.size, 1), generator)
    distances = np.concatenate([own[own.argsort()[:1]], drawn])
    gallery = np.full(distances.size, search.gallery)
    scores, ratio = combined(distances, gallery, moments[search.query], prior_items)
    scored = min(DEPTH, distances.size)
    best = np.argpartition(-scores, scored - 1)[:scored]
    best = best[np.argsort(-scores[best])]
    searched = Searched(
        people=distances.size,
        items=distances.size,
        unlabelled=0,
        own=0.0,
        ratio=ratio,
        images=search.images,
        beyond=[Beyond(distances.size, scored, float(scores[best[-1]]))],
    )
    answer = posterior(scores[best], best, searched, labelled=fit, unlabelled=fit)
    return float(answer.probabilities[0]), bool(own.size and best[0] == 0), answer.enrolled


def _smoothed(values: FloatArray, count: int, generator: np.random.Generator) -> FloatArray:
    width = 1.06 * values.std() * values.size**-0.2
    drawn: FloatArray = generator.choice(values, count) + width * generator.standard_normal(count)
    return drawn
