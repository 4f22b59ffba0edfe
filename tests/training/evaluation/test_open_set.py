"""Detection and identification by hand, and that it is of enrolled and other people."""

import numpy as np
import pytest

from training.evaluation.metrics import FloatArray, IntArray
from training.evaluation.open_set import (
    FALSE_ALARM_RATES,
    detection_and_identification,
    open_set_trial,
)


def test_rates_by_hand() -> None:
    mated = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    right = np.array([True, True, False, True, True])
    non_mated = np.array([0.35, 0.15, 0.9, 0.45, 0.8])
    # One of five may raise an alarm: the threshold is 0.35, the second nearest.
    assert detection_and_identification(mated, right, non_mated, 0.2) == 2 / 5
    # Two of five: 0.45; the query at 0.3 names the wrong person, the one at 0.5 is silent.
    assert detection_and_identification(mated, right, non_mated, 0.4) == 3 / 5
    # Less than one of five: these queries cannot tell.
    assert detection_and_identification(mated, right, non_mated, 0.19) is None
    assert detection_and_identification(mated[:0], right[:0], non_mated, 0.4) is None


def test_equal_scores_raise_no_more_alarms_than_allowed() -> None:
    non_mated = np.array([0.2, 0.2, 0.2, 0.9])
    mated = np.array([0.1, 0.2])
    both = np.array([True, True])
    # An alarm at 0.2 would be one for three of four: only what is nearer raises one.
    assert detection_and_identification(mated, both, non_mated, 0.25) == 1 / 2


def test_a_rate_that_is_a_whole_number_of_queries_is_not_rounded_down() -> None:
    non_mated = np.arange(30) / 30
    mated, right = np.array([2.5 / 30]), np.array([True])
    assert detection_and_identification(mated, right, non_mated, 0.1) == 1.0  # three alarms


def perfect(people: int, images: int, queries: int) -> tuple[FloatArray, IntArray, IntArray]:
    """Distance 0 to images of the query's person, 1 to all others."""
    gallery_ids = np.repeat(np.arange(people), images)
    query_ids = np.repeat(np.arange(people), queries)
    return (query_ids[:, None] != gallery_ids).astype(float), query_ids, gallery_ids


def test_a_perfect_score_finds_every_mated_query() -> None:
    score, query_ids, gallery_ids = perfect(people=21, images=2, queries=10)
    trial = open_set_trial(score, query_ids, gallery_ids, np.zeros(score.shape, dtype=bool), 0)
    assert (trial.mated, trial.non_mated) == (110, 100)  # 11 of 21 people are enrolled
    assert trial.dirs == (1.0,) * len(FALSE_ALARM_RATES)


def test_a_blind_score_finds_nobody() -> None:
    score, query_ids, gallery_ids = perfect(people=20, images=2, queries=10)
    trial = open_set_trial(np.ones_like(score), query_ids, gallery_ids, score < 0, 0)
    assert trial.dirs == (0.0,) * len(FALSE_ALARM_RATES)


def test_the_draw_follows_the_seed_and_rates_need_enough_queries() -> None:
    score, query_ids, gallery_ids = perfect(people=10, images=1, queries=4)
    score += np.random.default_rng(0).normal(0, 0.8, score.shape)
    none = np.zeros(score.shape, dtype=bool)
    trials = [open_set_trial(score, query_ids, gallery_ids, none, seed) for seed in (1, 1, 2)]
    assert trials[0] == trials[1] != trials[2]
    assert trials[0].dirs[0] is None  # 1 % of 20 non-mated queries is not one
    assert trials[0].dirs[1] is not None


def test_people_outside_the_gallery_are_non_mated_and_excluded_positives_left_out() -> None:
    score, query_ids, gallery_ids = perfect(people=4, images=1, queries=3)
    query_ids = np.append(query_ids, [77, 77])
    score = np.vstack([score, np.ones((2, 4))])
    excluded = np.zeros(score.shape, dtype=bool)
    everyone = open_set_trial(score, query_ids, gallery_ids, excluded, 0)
    assert (everyone.mated, everyone.non_mated) == (6, 6 + 2)
    excluded[np.arange(0, 12, 3), gallery_ids] = True  # the first query of each person
    some = open_set_trial(score, query_ids, gallery_ids, excluded, 0)
    assert (some.mated, some.non_mated) == (4, 8)


def test_an_excluded_image_raises_no_alarm() -> None:
    # One enrolled person; every query of the other is nearest to an image that it must ignore.
    gallery_ids = np.array([0, 1])
    query_ids = np.repeat([0, 1], 10)
    score = np.where(query_ids[:, None] == gallery_ids, 0.5, 0.1)
    excluded = query_ids[:, None] != gallery_ids
    trial = open_set_trial(score, query_ids, gallery_ids, excluded, 0)
    assert trial.dirs[1] == pytest.approx(1.0)
