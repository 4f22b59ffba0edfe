"""Rank metrics against values worked out by hand, a plain loop, and the public evaluation code."""

from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paths import CONFORMANCE
from training.evaluation import RankMetrics, rank_metrics
from training.evaluation.metrics import IntArray, Protocol, score_queries

PROTOCOLS: tuple[Protocol, ...] = ("sysu", "regdb", "llcm")


class Case(NamedTuple):
    """What `rank_metrics` is given."""

    distance: npt.NDArray[np.floating[Any]]
    query_ids: IntArray
    gallery_ids: IntArray
    query_cameras: IntArray
    gallery_cameras: IntArray
    protocol: Protocol


def plain_loop(case: Case) -> RankMetrics | None:
    """The protocols' sentences, one after the other; None when no query can be answered."""
    distance, query_ids, gallery_ids, query_cameras, gallery_cameras, protocol = case
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


@pytest.mark.parametrize(
    ("protocol", "number"), [("sysu", 0), ("sysu", 3), ("regdb", 1), ("llcm", 2)]
)
def test_conformance_with_the_public_evaluation_code(protocol: Protocol, number: int) -> None:
    with np.load(CONFORMANCE / f"{protocol}_{number}.npz") as z:
        actual = rank_metrics(
            z["distance"],
            z["query_id"],
            z["gallery_id"],
            z["query_camera"],
            z["gallery_camera"],
            protocol,
        )
        assert_same(actual, RankMetrics(z["cmc"], float(z["map"]), float(z["minp"])), 1e-6)


def test_by_hand_sysu() -> None:
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


def test_camera_6_ignores_nothing() -> None:
    metrics = rank_metrics([[0.0, 1.0]], [1], [1, 2], [6], [2, 2], "sysu")
    assert metrics.cmc[0] == metrics.mean_ap == metrics.mean_inp == 1.0


def test_by_hand_regdb_counts_every_image() -> None:
    metrics = rank_metrics([[0.0, 1.0, 2.0, 3.0]], [1], [2, 2, 1, 1], [1], [2, 2, 2, 2], "regdb")
    assert metrics.cmc[:4].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert metrics.mean_ap == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert metrics.mean_inp == pytest.approx(2 / 4)


def test_by_hand_llcm_drops_own_identity_in_own_camera() -> None:
    # The first image is person 1 in the query's camera 4: dropped. Left: 2, 1.
    metrics = rank_metrics([[0.0, 1.0, 2.0]], [1], [1, 2, 1], [4], [4, 4, 5], "llcm")
    assert metrics.cmc[:2].tolist() == [0.0, 1.0]
    assert metrics.mean_ap == metrics.mean_inp == pytest.approx(1 / 2)


def test_query_without_positive_is_skipped_and_reported() -> None:
    scores = score_queries([[0.0, 1.0], [0.0, 1.0]], [9, 1], [1, 2], [6, 6], [1, 1])
    assert scores.answerable.tolist() == [False, True]
    assert scores.summary().mean_ap == 1.0


def test_ties_keep_the_order_of_the_gallery() -> None:
    first = rank_metrics([[1.0, 1.0]], [1], [1, 2], [6], [1, 1])
    second = rank_metrics([[1.0, 1.0]], [1], [2, 1], [6], [1, 1])
    assert (first.cmc[0], second.cmc[0]) == (1.0, 0.0)


def test_cmc_has_the_length_asked_for() -> None:
    arguments = ([[0.0, 1.0]], [1], [2, 1], [6], [1, 1])
    assert rank_metrics(*arguments).cmc.shape == (20,)
    assert rank_metrics(*arguments, max_rank=1).cmc.tolist() == [0.0]


class Arguments(TypedDict, total=False):
    """Of `rank_metrics`, by their names."""

    distance: npt.ArrayLike
    query_ids: npt.ArrayLike
    gallery_ids: npt.ArrayLike
    query_cameras: npt.ArrayLike
    gallery_cameras: npt.ArrayLike
    protocol: Protocol


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
def test_refusals_are_sentences(change: Arguments, word: str) -> None:
    arguments: Arguments = {
        "distance": [[0.0, 1.0]],
        "query_ids": [1],
        "gallery_ids": [1, 2],
        "query_cameras": [3],
        "gallery_cameras": [1, 1],
        "protocol": "sysu",
    }
    with pytest.raises(ValueError, match=word):
        rank_metrics(**(arguments | change))


@st.composite
def small_cases(draw: st.DrawFn) -> Case:
    n_queries = draw(st.integers(1, 5))
    n_gallery = draw(st.integers(1, 12))

    def labels(count: int, top: int) -> IntArray:
        return np.array(draw(st.lists(st.integers(1, top), min_size=count, max_size=count)))

    # Few distinct distances, so that ties are common.
    return Case(
        np.stack([labels(n_gallery, 6).astype(float) for _ in range(n_queries)]),
        labels(n_queries, 4),
        labels(n_gallery, 4),
        labels(n_queries, 4),
        labels(n_gallery, 4),
        draw(st.sampled_from(PROTOCOLS)),
    )


@settings(max_examples=150, deadline=None)
@given(case=small_cases())
def test_equals_the_plain_loop(case: Case) -> None:
    expected = plain_loop(case)
    if expected is None:
        with pytest.raises(ValueError, match="No query"):
            rank_metrics(*case)
    else:
        assert_same(rank_metrics(*case), expected)


def random_case(protocol: Protocol, seed: int) -> Case:
    generator = np.random.default_rng(seed)
    size = 60, 80
    query_ids, gallery_ids = (generator.integers(1, 9, n) for n in size)
    query_cameras, gallery_cameras = (generator.integers(1, 7, n) for n in size)
    return Case(
        generator.random(size), query_ids, gallery_ids, query_cameras, gallery_cameras, protocol
    )


@pytest.fixture
def sorted_rows(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Every row of distances of which the order of its columns was asked for."""
    rows: list[list[float]] = []
    argsort = np.argsort

    def recording(
        values: npt.NDArray[Any], axis: int = -1, kind: Literal["stable"] | None = None
    ) -> IntArray:
        if values.ndim == 2:
            rows.extend(values.tolist())
        return argsort(values, axis=axis, kind=kind)

    monkeypatch.setattr(np, "argsort", recording)
    return rows


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_counting_equals_sorting_without_a_stable_sort(
    protocol: Protocol, dtype: type[np.floating[Any]], sorted_rows: list[list[float]]
) -> None:
    """Without ties no query needs it."""
    case = random_case(protocol, seed=5)
    case = case._replace(distance=case.distance.astype(dtype))
    expected = plain_loop(case)
    assert expected is not None
    assert_same(rank_metrics(*case), expected)
    assert sorted_rows == []


def test_only_tied_queries_are_sorted(sorted_rows: list[list[float]]) -> None:
    case = random_case("regdb", seed=3)
    positive = np.flatnonzero(case.gallery_ids == case.query_ids[7])[0]
    negative = np.flatnonzero(case.gallery_ids != case.query_ids[7])[0]
    case.distance[7, negative] = case.distance[7, positive]
    expected = plain_loop(case)
    assert expected is not None
    assert_same(rank_metrics(*case), expected)
    assert sorted_rows == [case.distance[7].tolist()]


def test_an_infinite_distance_of_a_positive_is_ranked_last() -> None:
    infinite = float("inf")
    metrics = rank_metrics([[infinite, 1.0, infinite]], [1], [2, 2, 1], [3], [2, 1, 1], "sysu")
    assert metrics.mean_ap == metrics.mean_inp == pytest.approx(1 / 2)
