"""Rank metrics against values worked out by hand, a plain loop, and the public evaluation code."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paths import CONFORMANCE
from training.evaluation import RankMetrics, rank_metrics
from training.evaluation import metrics as metrics_module
from training.evaluation.metrics import score_queries


def plain_loop(distance, query_ids, gallery_ids, query_cameras, gallery_cameras, protocol):
    """The protocols' sentences, one after the other; None when no query can be answered."""
    hits, precisions, penalties = [], [], []
    for q, row in enumerate(distance):
        ranking = sorted(range(len(row)), key=lambda n: (row[n], n))
        if protocol == "sysu":
            ranking = [
                n for n in ranking if not (query_cameras[q] == 3 and gallery_cameras[n] == 2)
            ]
        if protocol == "llcm":
            ranking = [
                n
                for n in ranking
                if not (gallery_ids[n] == query_ids[q] and gallery_cameras[n] == query_cameras[q])
            ]
        names = [gallery_ids[n] for n in ranking]
        if query_ids[q] not in names:
            continue
        ranks = [i + 1 for i, name in enumerate(names) if name == query_ids[q]]
        precisions.append(sum((i + 1) / rank for i, rank in enumerate(ranks)) / len(ranks))
        penalties.append(len(ranks) / ranks[-1])
        counted = names if protocol == "regdb" else list(dict.fromkeys(names))
        first = counted.index(query_ids[q]) + 1
        hits.append([float(first <= k) for k in range(1, 21)])
    if not hits:
        return None
    return RankMetrics(np.mean(hits, axis=0), float(np.mean(precisions)), float(np.mean(penalties)))


def assert_same(actual: RankMetrics, expected: RankMetrics, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(actual.cmc, expected.cmc, atol=tolerance, rtol=0)
    assert actual.mean_ap == pytest.approx(expected.mean_ap, abs=tolerance)
    assert actual.mean_inp == pytest.approx(expected.mean_inp, abs=tolerance)


@pytest.mark.parametrize("case", ["sysu_0", "sysu_3", "regdb_1", "llcm_2"])
def test_conformance_with_the_public_evaluation_code(case):
    with np.load(CONFORMANCE / f"{case}.npz") as z:
        actual = rank_metrics(
            z["distance"],
            z["query_id"],
            z["gallery_id"],
            z["query_camera"],
            z["gallery_camera"],
            case.split("_")[0],
        )
        assert_same(actual, RankMetrics(z["cmc"], float(z["map"]), float(z["minp"])), 1e-6)


def test_by_hand_sysu():
    # Person 1 in camera 3 ignores camera 2 (the nearest image). What is left: 2, 2, 1, 3, 1.
    # As identities: 2, 1, 3, so rank 2. As images: ranks 3 and 5, AP = (1/3 + 2/5) / 2.
    metrics = rank_metrics(
        [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]],
        [1],
        [1, 2, 2, 1, 3, 1],
        [3],
        [2, 1, 2 + 2, 4, 5, 1],
        "sysu",
    )
    assert metrics.cmc[:3].tolist() == [0.0, 1.0, 1.0]
    assert metrics.mean_ap == pytest.approx((1 / 3 + 2 / 5) / 2)
    assert metrics.mean_inp == pytest.approx(2 / 5)


def test_camera_6_ignores_nothing():
    metrics = rank_metrics([[0.0, 1.0]], [1], [1, 2], [6], [2, 2], "sysu")
    assert metrics.cmc[0] == metrics.mean_ap == metrics.mean_inp == 1.0


def test_by_hand_regdb_counts_every_image():
    metrics = rank_metrics([[0.0, 1.0, 2.0, 3.0]], [1], [2, 2, 1, 1], [1], [2, 2, 2, 2], "regdb")
    assert metrics.cmc[:4].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert metrics.mean_ap == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert metrics.mean_inp == pytest.approx(2 / 4)


def test_by_hand_llcm_drops_own_identity_in_own_camera():
    # The first image is person 1 in the query's camera 4: dropped. Left: 2, 1.
    metrics = rank_metrics([[0.0, 1.0, 2.0]], [1], [1, 2, 1], [4], [4, 4, 5], "llcm")
    assert metrics.cmc[:2].tolist() == [0.0, 1.0]
    assert metrics.mean_ap == metrics.mean_inp == pytest.approx(1 / 2)


def test_query_without_positive_is_skipped_and_reported():
    scores = score_queries([[0.0, 1.0], [0.0, 1.0]], [9, 1], [1, 2], [6, 6], [1, 1])
    assert scores.answerable.tolist() == [False, True]
    assert scores.summary().mean_ap == 1.0


def test_ties_keep_the_order_of_the_gallery():
    first = rank_metrics([[1.0, 1.0]], [1], [1, 2], [6], [1, 1])
    second = rank_metrics([[1.0, 1.0]], [1], [2, 1], [6], [1, 1])
    assert (first.cmc[0], second.cmc[0]) == (1.0, 0.0)


def test_cmc_has_the_length_asked_for():
    arguments = ([[0.0, 1.0]], [1], [2, 1], [6], [1, 1])
    assert rank_metrics(*arguments).cmc.shape == (20,)
    assert rank_metrics(*arguments, max_rank=1).cmc.tolist() == [0.0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"distance": [[0.0, float("nan")]]}, "NaN"),
        ({"distance": [0.0, 1.0]}, "Q×N"),
        ({"distance": np.zeros((0, 2))}, "Q×N"),
        ({"query_ids": [1, 2]}, "query_ids"),
        ({"gallery_ids": [1]}, "gallery_ids"),
        ({"query_cameras": []}, "query_cameras"),
        ({"gallery_cameras": [[1, 1]]}, "gallery_cameras"),
        ({"query_ids": [7]}, "No query"),
        ({"protocol": "market"}, "market"),
    ],
)
def test_refusals_are_sentences(change, word):
    arguments = {
        "distance": [[0.0, 1.0]],
        "query_ids": [1],
        "gallery_ids": [1, 2],
        "query_cameras": [3],
        "gallery_cameras": [1, 1],
        "protocol": "sysu",
    }
    with pytest.raises(ValueError, match=word):
        rank_metrics(**{**arguments, **change})


@settings(max_examples=150, deadline=None)
@given(data=st.data(), protocol=st.sampled_from(["sysu", "regdb", "llcm"]))
def test_equals_the_plain_loop(data, protocol):
    n_queries = data.draw(st.integers(1, 5))
    n_gallery = data.draw(st.integers(1, 12))

    def labels(count, top):
        return data.draw(st.lists(st.integers(1, top), min_size=count, max_size=count))

    # Few distinct distances, so that ties are common.
    distance = [[float(v) for v in labels(n_gallery, 6)] for _ in range(n_queries)]
    arguments = (
        distance,
        labels(n_queries, 4),
        labels(n_gallery, 4),
        labels(n_queries, 4),
        labels(n_gallery, 4),
        protocol,
    )
    expected = plain_loop(*arguments)
    if expected is None:
        with pytest.raises(ValueError, match="No query"):
            rank_metrics(*arguments)
    else:
        assert_same(rank_metrics(*arguments), expected)


def random_case(protocol, seed, n_queries=60, n_gallery=80):
    generator = np.random.default_rng(seed)
    labels = [generator.integers(1, 9, n) for n in (n_queries, n_gallery)]
    cameras = [generator.integers(1, 7, n) for n in (n_queries, n_gallery)]
    return generator.random((n_queries, n_gallery)), *labels, *cameras, protocol


@pytest.mark.parametrize("protocol", ["sysu", "regdb", "llcm"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_counting_equals_sorting_without_a_stable_sort(protocol, dtype, monkeypatch):
    """Without ties no query needs it."""
    distance, *rest = random_case(protocol, seed=5)
    case = distance.astype(dtype), *rest
    expected = plain_loop(*case)
    monkeypatch.delattr(metrics_module, "_score_by_sorting")
    assert_same(rank_metrics(*case), expected)


def test_only_tied_queries_are_sorted(monkeypatch):
    distance, *rest = random_case("regdb", seed=3)
    positive = np.flatnonzero(rest[1] == rest[0][7])[0]
    negative = np.flatnonzero(rest[1] != rest[0][7])[0]
    distance[7, negative] = distance[7, positive]
    sorted_rows = []
    plain_sort = metrics_module._score_by_sorting

    def recording(matrix, *arguments):
        sorted_rows.extend(matrix.tolist())
        return plain_sort(matrix, *arguments)

    monkeypatch.setattr(metrics_module, "_score_by_sorting", recording)
    assert_same(rank_metrics(distance, *rest), plain_loop(distance, *rest))
    assert sorted_rows == [distance[7].tolist()]


def test_an_infinite_distance_of_a_positive_is_ranked_last():
    infinite = float("inf")
    metrics = rank_metrics([[infinite, 1.0, infinite]], [1], [2, 2, 1], [3], [2, 1, 1], "sysu")
    assert metrics.mean_ap == metrics.mean_inp == pytest.approx(1 / 2)
