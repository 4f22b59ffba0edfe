"""Distances of both modalities → one score, and the numbers that a posterior is told."""

from __future__ import annotations

import numpy as np
import pytest

from model.config import Modality
from model.ranking import (
    DEPTH,
    Moments,
    RankingFacts,
    Reranking,
    combined,
    in_deviations,
    own_share,
    reranked,
    spread_ratio,
)

PRIOR: dict[Modality, Moments] = {"rgb": Moments(1.0, 0.1), "ir": Moments(0.6, 0.2)}
MODALITIES = np.array(["rgb", "ir", "rgb", "ir", "rgb"])
BETWEEN = {"rgb rgb": (0.5, 0.1), "rgb ir": (1.0, 0.2), "ir rgb": (1.0, 0.2), "ir ir": (0.4, 0.05)}
FACTS = RankingFacts(prior_items=30, between=BETWEEN)


def test_each_modality_is_measured_by_itself() -> None:
    distances = np.array([0.8, 0.4, 1.2, 0.7, 1.0])
    found, ratio = combined(distances, MODALITIES, PRIOR, prior_items=30)
    for (modality, (mean, deviation)), items in zip(PRIOR.items(), (3, 2), strict=True):
        chosen = modality == MODALITIES
        weights = np.r_[np.full(items, 1 / (items + 30)), np.full(2, 15 / (items + 30))]
        values = np.r_[distances[chosen], mean - deviation, mean + deviation]
        blended_mean = weights @ values
        blended_deviation = np.sqrt(weights @ (values - blended_mean) ** 2)
        expected = (blended_mean - distances[chosen]) / blended_deviation
        np.testing.assert_allclose(found[chosen], expected)
    assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("items", [1, 2, 5])
def test_few_or_equal_distances_are_finite(items: int) -> None:
    distances, modalities = np.full(items, 0.7), np.array(["ir"] * items)
    found, ratio = combined(distances, modalities, PRIOR, prior_items=30)
    assert np.isfinite([*found, ratio]).all()
    nothing: dict[Modality, Moments] = {"ir": Moments(0.7, 0.0)}
    found, ratio = combined(distances, modalities, nothing, prior_items=30)
    assert found.tolist() == [0.0] * items
    assert ratio == 1


def test_ratio_is_a_weighted_geometric_mean() -> None:
    counted = [(3, Moments(0, 2.0), Moments(0, 1.0)), (1, Moments(0, 1.0), Moments(0, 4.0))]
    assert spread_ratio(counted) == pytest.approx((2**3 / 4) ** 0.25)
    assert spread_ratio([]) == 1


def test_share_of_the_querys_own_modality() -> None:
    assert own_share("ir", {"ir": 1, "rgb": 3}) == 0.25
    assert own_share("rgb", {"ir": 4}) == 0
    assert own_share("mixed", {"ir": 1, "rgb": 3}) == 0.5
    assert own_share("ir", {}) == 0.5


def test_distances_among_items_are_those_of_their_pair() -> None:
    names = np.array(["rgb", "ir"])
    found = in_deviations(np.array([[0.4, 1.2], [1.2, 0.5]]), names, FACTS.between)
    np.testing.assert_allclose(found, [[-1, 1], [1, 2]])


def test_a_pair_of_modalities_of_which_nothing_is_known_goes_by_its_own_distances() -> None:
    names = np.array(["rgb", "ir", "rgb"])
    between = np.array([[0.0, 3.0, 4.0], [3.0, 0.0, 5.0], [4.0, 5.0, 0.0]])
    known = {"rgb rgb": (2.0, 2.0), "rgb ir": (1.0, 1.0)}
    found = in_deviations(between, names, known)
    np.testing.assert_allclose(found[np.ix_([0, 2], [0, 2])], [[-1, 1], [1, -1]])
    np.testing.assert_allclose(found[[0, 2], 1], [2, 4])
    np.testing.assert_allclose(found[1, [0, 2]], [-1, 1])  # of mean 4 and deviation 1
    assert found[1, 1] == 0  # a single one has no deviation
    assert np.isfinite(in_deviations(between, names, {})).all()
    assert in_deviations(np.empty((0, 0)), names[:0], {}).shape == (0, 0)


def test_only_the_best_are_reranked_and_only_raised() -> None:
    generator = np.random.default_rng(0)
    size = DEPTH + 50
    points = generator.standard_normal((size, 3))
    between = np.linalg.norm(points[:, None] - points, axis=2)
    scores = generator.standard_normal(size)
    names = np.where(generator.random(size) < 0.5, "ir", "rgb")

    def chosen(images: float) -> np.ndarray:
        return reranked(
            scores, names, lambda best: between[np.ix_(best, best)], FACTS, Reranking(), images
        )

    raised = chosen(4) - scores
    assert (raised >= 0).all()
    changed = np.flatnonzero(raised)
    assert 0 < changed.size < DEPTH
    assert np.isin(changed, np.argsort(-scores)[:DEPTH]).all()
    np.testing.assert_array_equal(chosen(1), scores)  # nobody has two images
