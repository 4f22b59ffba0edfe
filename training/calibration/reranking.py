"""Choose how a query is re-ranked, on searches like those of the public sets.

By mAP in galleries with several labelled images of each person, where it can help. It may not cost
anything elsewhere: what makes any kind of gallery worse by more than its standard error is out. Of
those that gain as much as the best within its standard error, one of the least weight is taken:
what re-ranking adds says little of whether the person is enrolled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from model.calibration import FloatArray
from model.config import MODALITIES
from model.ranking import DEPTH, RankingFacts, Reranking, neighbours_shared
from training.calibration.searches import GALLERIES, Draw, Fold, Scored, Search
from training.evaluation.metrics import IntArray

SEVERAL = 4  # images of a person; a gallery with one each, all labelled, is never re-ranked
GRID = tuple(
    Reranking(
        weight=weight,
        neighbours=neighbours,
        expansion=expansion,
        sharpness=sharpness,
        unlabelled_images=unlabelled,
    )
    for weight, neighbours, expansion, sharpness, unlabelled in product(
        # At a weight of 3 mAP gains half a point more, and probabilities lose a lot.
        (1, 2),
        (1, 1.5, 2),
        (2, 3),
        (0.5, 1),
        (1, 1.5),
    )
)


@dataclass(frozen=True)
class Gain:
    """In galleries of one kind: mAP before re-ranking and what it adds, with its standard error."""

    before: float
    gain: float
    error: float


@dataclass(frozen=True)
class RerankingChoice:
    """chosen: with `default` where it helps and costs nothing. gains: by kind of gallery."""

    chosen: Reranking
    gains: dict[str, Gain] = field(default_factory=dict)


@dataclass
class _Case:
    """One search, labelled or not, whose similarities are computed once for each neighbourhood."""

    fold: Fold
    found: Scored
    kind: str
    labelled: bool
    similarities: dict[tuple[int, int, float], FloatArray] = field(default_factory=dict)

    @cached_property
    def before(self) -> float:
        """Average precision of the person's images by score alone."""
        return self._precision(self.found.scores)

    def precision(self, reranking: Reranking, facts: RankingFacts) -> float:
        """The same after re-ranking."""
        items = len(self.found.scores)
        counts = (items, self.found.search.people, 0) if self.labelled else (0, 0, items)
        images = reranking.images(*counts)
        share = reranking.share(images)
        if not share:
            return self.before
        key = reranking.size(images), reranking.expansion, reranking.sharpness
        if key not in self.similarities:
            self.similarities[key] = self._similarity(key[0], reranking, facts)
        return self._precision(self.found.scores + share * self.similarities[key])

    def _precision(self, scores: FloatArray) -> float:
        relevant = self.found.people[np.argsort(-scores, kind="stable")]
        hits = np.flatnonzero(relevant == self.found.search.asked)
        return float(((np.arange(hits.size) + 1) / (hits + 1)).mean())

    def _similarity(self, size: int, reranking: Reranking, facts: RankingFacts) -> FloatArray:
        best = np.argsort(-self.found.scores, kind="stable")[:DEPTH]
        items = self.found.search.items[best]
        between = self.fold.between[np.ix_(items, items)]
        added = np.zeros(len(self.found.scores))
        added[best] = neighbours_shared(
            self.found.scores[best],
            self.fold.modalities[items],
            between,
            facts.between,
            size,
            reranking,
        )
        return added


def choose_reranking(
    folds: Sequence[Fold], facts: RankingFacts, *, modulated: bool, count: int
) -> RerankingChoice:
    """The best of `GRID`, or of those that cost something the best, and then not by default.

    count: searches of each fold, kind and number of images.
    """
    cases = [
        case
        for number, fold in enumerate(folds)
        for case in _cases(fold, facts, number, count, modulated=modulated)
    ]
    if not cases:
        return RerankingChoice(Reranking(default=False))
    compared = [(reranking, _gains(cases, reranking, facts)) for reranking in GRID]
    free = [(r, gains) for r, gains in compared if all(g.gain >= -g.error for g in gains.values())]
    best = max(_worth(gains) for _, gains in free or compared)
    near = [one for one in free or compared if _worth(one[1]).gain >= best.gain - best.error]
    least = min(reranking.weight for reranking, _ in near)
    reranking, gains = max(
        (one for one in near if one[0].weight == least), key=lambda one: _worth(one[1])
    )
    default = bool(free) and _worth(gains).gain > 0
    return RerankingChoice(reranking.model_copy(update={"default": default}), gains)


def _cases(
    fold: Fold, facts: RankingFacts, number: int, count: int, *, modulated: bool
) -> list[_Case]:
    draw = Draw(fold, 1000 + number)
    drawn: list[tuple[tuple[Search, IntArray], int]] = []
    for images, modality, gallery in product((SEVERAL, 1), MODALITIES, GALLERIES):
        for _ in range(count):
            one = draw.one(modality, gallery, len(draw.people), images, 1, True, len(drawn))
            if one:
                drawn.append((one, images))
    if not drawn:
        return []
    apart = fold.asking([one for one, _ in drawn])
    found = apart.scored(facts.prior_items, modulated=modulated)
    cases = []
    for scored, (_, images) in zip(found, drawn, strict=True):
        several = "several images" if images > 1 else "one image"
        for labelled in (True, False) if images > 1 else (False,):
            name = f"{scored.search.kind}, {several}, {'labelled' if labelled else 'unlabelled'}"
            cases.append(_Case(apart, scored, name, labelled))
    return cases


def _gains(cases: Sequence[_Case], reranking: Reranking, facts: RankingFacts) -> dict[str, Gain]:
    by_kind = defaultdict(list)
    for case in cases:
        gain = case.precision(reranking, facts) - case.before
        by_kind[case.kind].append((case.before, gain))
    found = {}
    for kind, rows in by_kind.items():
        before, gain = np.array(rows).T
        error = float(gain.std() / len(rows) ** 0.5)
        found[kind] = Gain(float(before.mean()), float(gain.mean()), error)
    return found


class _Worth(NamedTuple):
    """Mean gain in labelled galleries; then in the others, and the standard error of the first."""

    gain: float
    others: float
    error: float


def _worth(gains: dict[str, Gain]) -> _Worth:
    labelled, others = (
        [gain for kind, gain in gains.items() if kind.endswith(", labelled") == named]
        for named in (True, False)
    )
    return _Worth(
        float(np.mean([gain.gain for gain in labelled])),
        float(np.mean([gain.gain for gain in others])),
        float(np.sqrt(np.sum([gain.error**2 for gain in labelled])) / len(labelled)),
    )
