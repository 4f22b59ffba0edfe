"""Scores, re-ranking and agreement against plain loops."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from pydantic import ValidationError

from model.ranking import Moments, Reranking, blended, moments_of, reciprocal_similarity, scores
from model.ranking.agreement import agreement
from model.ranking.facts import AgreementFit, RankingFacts


def test_blended_moments_are_those_of_all_distances_together() -> None:
    generator = np.random.default_rng(0)
    here, prior = generator.normal(5, 2, 30), generator.normal(7, 1, 30)
    found = blended(moments_of(here), 30, moments_of(prior), 30)
    together = np.concatenate([here, prior])
    assert found == pytest.approx((together.mean(), together.std()))
    assert blended(None, 0, Moments(3, 2), 30) == Moments(3, 2)
    # One item says little: a gallery of many says nearly all.
    assert blended(Moments(9, 0), 1, Moments(3, 2), 99).mean == pytest.approx(3.06)
    assert blended(Moments(9, 1), 99_000, Moments(3, 2), 1) == pytest.approx((9, 1), rel=1e-3)


def test_a_score_falls_strictly_with_the_distance_and_is_always_finite() -> None:
    distances = np.array([0.1, 0.5, 0.50001, 3.0])
    found = scores(distances, Moments(1.0, 0.25))
    assert found.tolist() == pytest.approx([(1 - d) / 0.25 for d in distances])
    assert (np.diff(found) < 0).all()
    assert np.isfinite(scores(np.full(3, 2.0), moments_of(np.full(3, 2.0)))).all()


def plain_similarity(
    to_query: list[float], between: list[list[float]], size: int, facts: Reranking
) -> list[float]:
    """k-reciprocal encoding and the Jaccard measure with sets and loops; the query is image 0."""
    count = len(to_query) + 1
    distance = [[0.0] * count for _ in range(count)]
    for i in range(1, count):
        distance[0][i] = distance[i][0] = to_query[i - 1]
        for j in range(1, count):
            distance[i][j] = between[i - 1][j - 1]

    def nearest(i: int) -> list[int]:
        return [i, *sorted((j for j in range(count) if j != i), key=lambda j: distance[i][j])]

    def mutual(i: int, k: int) -> set[int]:
        return {j for j in nearest(i)[: k + 1] if i in nearest(j)[: k + 1]}

    encodings = []
    for i in range(count):
        members = mutual(i, size)
        widened = set(members)
        for j in members:
            theirs = mutual(j, round(size / 2))
            if 3 * len(members & theirs) > 2 * len(theirs):
                widened |= theirs
        least = min((distance[i][j] for j in range(count) if j != i), default=0)
        weights = {
            j: 1.0 if j == i else math.exp(-facts.sharpness * (distance[i][j] - least))
            for j in widened
        }
        encodings.append({j: weight / sum(weights.values()) for j, weight in weights.items()})
    averaged = []
    for i in range(count):
        around = nearest(i)[: facts.expansion]
        averaged.append(
            [sum(encodings[j].get(k, 0) for j in around) / len(around) for k in range(count)]
        )
    found = []
    for i in range(1, count):
        smaller = sum(min(a, b) for a, b in zip(averaged[0], averaged[i], strict=True))
        larger = sum(max(a, b) for a, b in zip(averaged[0], averaged[i], strict=True))
        found.append(smaller / larger)
    return found


@pytest.mark.parametrize("size", [2, 4, 6, 20])
@pytest.mark.parametrize("expansion", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 25])
def test_reranking_is_that_of_the_plain_loops(count: int, expansion: int, size: int) -> None:
    generator = np.random.default_rng(count)
    places = generator.standard_normal((count + 1, 3))
    distance = np.linalg.norm(places[:, None] - places, axis=2)
    facts = Reranking(expansion=expansion, sharpness=0.7)
    to_query, between = distance[0, 1:], distance[1:, 1:]
    found = reciprocal_similarity(to_query, between, size, facts)
    expected = plain_similarity(to_query.tolist(), between.tolist(), size, facts)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert ((found >= 0) & (found <= 1)).all()


def test_the_weight_follows_how_many_images_people_have() -> None:
    facts = Reranking(weight=2, neighbours=1.5, fewest=4, most=20, unlabelled_images=1.5)
    assert facts.share(facts.images(labelled=10, people=10, unlabelled=0)) == 0
    assert facts.share(facts.images(labelled=40, people=10, unlabelled=0)) == 2
    assert facts.share(facts.images(labelled=0, people=0, unlabelled=30)) == pytest.approx(1)
    assert facts.share(facts.images(labelled=0, people=0, unlabelled=0)) == 0
    assert [facts.size(images) for images in (1, 4, 100)] == [4, 6, 20]


def test_agreement_tells_a_part_that_matches_from_one_that_does_not() -> None:
    generator = np.random.default_rng(0)
    references = generator.normal([10, 1], [2, 0.1], (200, 2))
    mean, deviation = references.mean(0), references.std(0)
    fit = AgreementFit(query="ir", gallery="rgb", slopes=(2.0, 3.0), intercepts=(-1.0, 0.5))
    parts = np.array([[4.0, 1.3], [10.0, 0.6]])
    found = agreement(parts, references, fit)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        standard = (mean[column] - parts[row, column]) / deviation[column]
        logit = fit.slopes[column] * standard + fit.intercepts[column]
        assert found[row, column] == pytest.approx(1 / (1 + math.exp(-logit)))
    assert found[0, 0] > 0.9 > 0.1 > found[0, 1]  # the first part matches, the second does not


def test_of_an_earlier_release_the_agreement_of_unmodulated_parts_is_kept() -> None:
    def fit(modulated: bool, slope: float) -> str:
        return (
            f'{{"query": "ir", "gallery": "rgb", "modulated": {str(modulated).lower()}, '
            f'"slopes": [{slope}], "intercepts": [0]}}'
        )

    text = f'{{"prior_items": 30, "agreements": [{fit(True, 1)}, {fit(False, 2)}]}}'
    for facts in (
        RankingFacts.model_validate_json(text),
        RankingFacts.model_validate(json.loads(text)),
    ):
        kept = AgreementFit(query="ir", gallery="rgb", slopes=(2.0,), intercepts=(0.0,))
        assert facts.agreements == (kept,)
        assert facts.agreement("ir", "rgb") == kept
        assert facts.agreement("rgb", "ir") is None
        assert RankingFacts.model_validate_json(facts.model_dump_json()) == facts
    for wrong in ("3", "[3]", '[{"query": "ir"}]'):
        with pytest.raises(ValidationError):
            RankingFacts.model_validate_json(f'{{"prior_items": 30, "agreements": {wrong}}}')
