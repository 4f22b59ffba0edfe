"""Probabilities against the formulas in plain loops, and what must hold between them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ranking import Beyond, PosteriorFit, Searched, posterior

LABELLED = PosteriorFit(
    modulated=True, reranked=False, labelled=True,
    slope=2.1, spread=1.4, images=0.2, offset=3.4, size=0.97, own=1.6, raised=1.2,
)  # fmt: skip
UNLABELLED = LABELLED.model_copy(update={"labelled": False, "slope": 1.7, "offset": 2.9})


def reference(
    scores: list[float], people: list[int], searched: Searched, prior: float
) -> tuple[list[float], float]:
    """Where all items are scored, number by number."""
    odds = prior / (1 - prior)

    def weight(score: float, fit: PosteriorFit) -> float:
        slope = fit.slope * searched.ratio**fit.spread * searched.images**fit.images
        penalty = fit.offset + fit.size * math.log(searched.items) + fit.own * searched.own
        penalty += fit.raised * searched.raised
        return odds * math.exp(slope * score - penalty)

    best: dict[int, float] = {}
    for score, person in zip(scores, people, strict=True):
        if person >= 0:
            best[person] = max(best.get(person, -math.inf), score)
    named = sum(weight(score, LABELLED) for score in best.values())
    alone = [weight(s, UNLABELLED) for s, p in zip(scores, people, strict=True) if p < 0]
    found = [
        weight(best[p], LABELLED) / (1 + named)
        if p >= 0
        else weight(s, UNLABELLED) / (1 + weight(s, UNLABELLED))
        for s, p in zip(scores, people, strict=True)
    ]
    return found, (named + sum(alone)) / (1 + named + sum(alone))


def whole(people: list[int], **changes: object) -> Searched:
    """A search of which everything is scored."""
    unlabelled = sum(person < 0 for person in people)
    different = len({person for person in people if person >= 0}) + unlabelled
    searched = Searched(different, len(people), unlabelled, own=0.0)
    return replace(searched, **changes)  # type: ignore[arg-type]


def answer(
    scores: list[float], people: list[int], searched: Searched, prior: float = 0.5
) -> tuple[list[float], float]:
    found = posterior(
        np.array(scores, np.float64),
        np.array(people, np.int64),
        searched,
        labelled=LABELLED,
        unlabelled=UNLABELLED,
        prior=prior,
    )
    return found.probabilities.tolist(), found.enrolled


items = st.lists(st.tuples(st.floats(-30, 30), st.integers(-1, 4)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    *(items, st.floats(0.001, 0.999), st.floats(0, 1), st.floats(0.2, 3)),
    *(st.integers(1, 16), st.floats(0, 3)),
)
def test_probabilities_are_those_of_the_plain_formulas(
    drawn: list[tuple[float, int]],
    prior: float,
    own: float,
    ratio: float,
    images: int,
    raised: float,
) -> None:
    scores, people = [s for s, _ in drawn], [p for _, p in drawn]
    searched = whole(people, own=own, ratio=ratio, images=images, raised=raised)
    found, enrolled = answer(scores, people, searched, prior)
    expected, expected_enrolled = reference(scores, people, searched, prior)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert enrolled == pytest.approx(expected_enrolled, rel=1e-9, abs=1e-12)
    assert all(0 <= p <= enrolled * (1 + 1e-12) <= 1 + 1e-12 for p in found)
    if min(people) >= 0:
        of_people = dict(zip(people, found, strict=True))
        assert sum(of_people.values()) == pytest.approx(enrolled, rel=1e-9)
    alone = sorted((s, p) for s, p, q in zip(scores, found, people, strict=True) if q < 0)
    assert [p for _, p in alone] == sorted(p for _, p in alone)  # never against the order


@pytest.mark.parametrize("prior", [0.001, 0.2, 0.9])
def test_odds_follow_the_prior(prior: float) -> None:
    scores, people = [3.1, 2.9, 2.8, 1.0, 0.1], [3, -1, 3, 1, -1]
    _, even = answer(scores, people, whole(people))
    _, enrolled = answer(scores, people, whole(people), prior)
    odds = even / (1 - even) * prior / (1 - prior)
    assert enrolled / (1 - enrolled) == pytest.approx(odds, rel=1e-9)


@pytest.mark.parametrize("people", [[0], [-1], [0, 0, 0], [-1, 0]])
@pytest.mark.parametrize("score", [-1e9, -50.0, 0.0, 50.0, 1e9])
def test_extremes_stay_probabilities(people: list[int], score: float) -> None:
    found, enrolled = answer([score] * len(people), people, whole(people))
    assert all(0 <= p <= 1 for p in [*found, enrolled])
    assert math.isfinite(enrolled)


def test_what_is_not_scored_counts_as_a_normal_tail() -> None:
    generator = np.random.default_rng(0)
    size = 100_000
    scores = np.sort(generator.standard_normal(size))[::-1]
    scores[0] = 6.5
    people = np.arange(size)
    everything = Searched(size, size, 0, own=0.0)
    seen = {}
    for count in (100, 1000, size):
        beyond = [Beyond(size, count, float(scores[count - 1]))]
        searched = replace(everything, beyond=beyond if count < size else [])
        found = posterior(
            scores[:count], people[:count], searched, labelled=LABELLED, unlabelled=UNLABELLED
        )
        seen[count] = float(found.probabilities[0]), found.enrolled
    assert 0.02 < seen[size][0] < 0.98  # so that the others matter
    for count in (100, 1000):
        assert seen[count] == pytest.approx(seen[size], abs=0.02)
