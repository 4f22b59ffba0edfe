"""k-reciprocal re-ranking against the paper's definitions, written as loops over sets."""

import numpy as np
import pytest

from training.evaluation.metrics import FloatArray
from training.evaluation.rerank import k_reciprocal


def plain(dissimilarity: FloatArray, n_queries: int, k1: int, k2: int, weight: float) -> FloatArray:
    """Zhong et al. (2017), equations (1) to (12), one image after the other."""
    distance = dissimilarity.astype(float).copy()
    np.fill_diagonal(distance, 0)
    distance /= distance.max(axis=1, keepdims=True)
    total = len(distance)
    for_ranking = distance.copy()
    np.fill_diagonal(for_ranking, -1)
    ranking = np.argsort(for_ranking, axis=1, kind="stable")

    def reciprocal(i: int, k: int) -> set[int]:
        return {int(j) for j in ranking[i, : k + 1] if i in ranking[j, : k + 1]}

    encoding = np.zeros((total, total))
    for i in range(total):
        own = reciprocal(i, k1)
        expanded = set(own)
        for candidate in own:
            theirs = reciprocal(candidate, round(k1 / 2))
            if len(theirs & own) > 2 / 3 * len(theirs):
                expanded |= theirs
        members = sorted(expanded)
        encoding[i, members] = np.exp(-distance[i, members])
        encoding[i] /= encoding[i].sum()
    encoding = np.stack([encoding[ranking[i, :k2]].mean(axis=0) for i in range(total)])
    result = np.empty((n_queries, total - n_queries))
    for q in range(n_queries):
        for g in range(n_queries, total):
            pair = encoding[[q, g]]
            jaccard = 1 - pair.min(axis=0).sum() / pair.max(axis=0).sum()
            result[q, g - n_queries] = (1 - weight) * jaccard + weight * distance[q, g]
    return result


def clusters(seed: int, total: int = 40, symmetric: bool = True) -> FloatArray:
    generator = np.random.default_rng(seed)
    points = (
        generator.normal(size=(total, 5)) + 2 * generator.normal(size=(8, 5))[np.arange(total) % 8]
    )
    squared: FloatArray = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    return squared if symmetric else squared * generator.uniform(0.5, 1.5, squared.shape)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k1", "k2", "weight"), [(20, 6, 0.3), (7, 1, 0.0), (3, 3, 0.8)])
def test_equals_the_definition(symmetric: bool, k1: int, k2: int, weight: float) -> None:
    dissimilarity = clusters(k1, symmetric=symmetric)
    before = dissimilarity.copy()
    fast = k_reciprocal(dissimilarity, 12, k1=k1, k2=k2, weight=weight)
    np.testing.assert_allclose(fast, plain(dissimilarity, 12, k1, k2, weight), atol=1e-5)
    np.testing.assert_array_equal(dissimilarity, before)


def test_the_original_distance_alone_keeps_the_ranking() -> None:
    dissimilarity = clusters(1)
    fast = k_reciprocal(dissimilarity, 12, weight=1.0)
    np.testing.assert_array_equal(
        np.argsort(fast, axis=1), np.argsort(dissimilarity[:12, 12:], axis=1)
    )


def test_fewer_images_than_neighbours() -> None:
    fast = k_reciprocal(clusters(2, total=5), 2)
    assert fast.shape == (2, 3)
    assert np.isfinite(fast).all()
