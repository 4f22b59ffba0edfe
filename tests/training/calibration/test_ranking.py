"""Fits of ranking: what was drawn from the model is found again, what is stuck is told."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad

from model import CMT, CMTConfig
from model.config import MODALITIES
from model.ranking import PosteriorFit, RankingFacts, posterior
from training.calibration.extrapolation import extrapolate
from training.calibration.people import HeldOut, together
from training.calibration.posterior import (
    STARTS,
    Batch,
    batch_of,
    first_probability,
    fit_posterior,
    fitted,
    loss,
)
from training.calibration.ranking import between_references, fit_ranking
from training.calibration.reranking import choose_reranking
from training.calibration.searches import FEWEST, Draw, Fold, Scored, Search
from training.calibration.strength import choose_strength
from training.datasets import DatasetError, DatasetName, Sample
from training.evaluation.embedding import Embedded

TRUTH = (0.6, 0.8, 0.1, 2.5, 0.9, 1.2, 0.7)


def made_up(model: CMT, people: int, *, seed: int = 0, signal: float = 1.0) -> Embedded:
    """Three images of each person by each of the six cameras of SYSU-MM01."""
    generator = torch.Generator().manual_seed(seed)
    samples = [
        Sample(
            Path(f"cam{camera}/{person:04d}/{image:04d}.jpg"),
            person,
            camera,
            "ir" if camera in (3, 6) else "rgb",
        )
        for person in range(1, people + 1)
        for camera in range(1, 7)
        for image in range(3)
    ]
    size = model.config.parts, model.config.dim
    centers = torch.randn(people + 1, *size, generator=generator)
    kinds = torch.randn(2, *size, generator=generator)
    rows = torch.stack(
        [signal * centers[s.person_id] + kinds[int(s.modality == "ir")] for s in samples]
    )
    rows = model.ranked_form(rows + 2 * torch.randn(rows.shape, generator=generator))
    return Embedded(samples, rows, None, rows)


@pytest.fixture(scope="module")
def held_out(tiny_model: CMT) -> HeldOut:
    """Two sets, whose people have the same numbers and are others."""
    sets = [made_up(tiny_model, 10, seed=seed) for seed in (1, 2)]
    return together(sets, DatasetName.SYSU)


@pytest.fixture(scope="module")
def folds(tiny_model: CMT, held_out: HeldOut) -> list[Fold]:
    found = []
    for number, rows in enumerate(held_out.folds()):
        fold = Fold(tiny_model, held_out, rows)
        found.append(fold.asking(Draw(fold, number).searches(40)))
    return found


def test_people_of_two_sets_are_others(held_out: HeldOut) -> None:
    assert np.unique(held_out.people).size == 20
    first, second = held_out.folds()
    assert not set(held_out.people[first]) & set(held_out.people[second])
    one = together([made_up_set(held_out, first)], DatasetName.SYSU)
    halves = one.folds()
    assert [np.unique(one.people[half]).size for half in halves] == [5, 5]
    assert not set(one.people[halves[0]]) & set(one.people[halves[1]])


def made_up_set(held_out: HeldOut, rows: np.ndarray) -> Embedded:
    chosen = held_out.rows(rows)
    return Embedded([held_out.samples[i] for i in rows.tolist()], chosen, None, chosen)


def test_searches_are_of_every_kind_and_leave_out_what_is_too_easy(folds: list[Fold]) -> None:
    searches = [(fold, search) for fold in folds for search in fold.searches]
    kinds = Counter(kind for _, search in searches for kind in search.kinds)
    assert min(kinds[kind] for kind in ("visible", "infrared", "mixed", "same kind")) >= 40
    assert min(kinds[kind] for kind in ("fewer than 5", "5 to 10", "several images")) > 20
    assert 0.4 < np.mean([search.present for _, search in searches]) < 0.6
    for fold, search in searches:
        assert (search.asked in fold.people[search.items]) == search.present
        assert np.unique(fold.people[search.items]).size == search.people
        shown = set(fold.modalities[search.items].tolist())
        assert shown <= ({*MODALITIES} if search.gallery == "mixed" else {search.gallery})
        assert max(Counter(fold.people[search.items].tolist()).values()) <= 4
    assert min(search.people for _, search in searches) < FEWEST


def test_a_query_is_never_in_its_gallery(tiny_model: CMT, held_out: HeldOut) -> None:
    fold = Fold(tiny_model, held_out, held_out.folds()[0])
    drawn = Draw(fold, 3).searches(20)
    for search, shown in drawn:
        assert not set(shown.tolist()) & set(search.items.tolist())
        cameras = set(fold.cameras[shown].tolist())
        own = search.items[fold.people[search.items] == search.asked]
        assert not cameras & set(fold.cameras[own].tolist())
        if 3 in cameras:  # which stands beside camera 2
            assert 2 not in fold.cameras[search.items]
        assert 1 <= len(shown) == search.images <= 4
    asked = fold.asking(drawn)
    several = next(number for number, (_, shown) in enumerate(drawn) if len(shown) > 1)
    mean = fold.images[torch.from_numpy(drawn[several][1])].mean(0)
    assert torch.allclose(asked.queries[several], mean / mean.norm(), atol=1e-6)


def drawn_from_the_model(count: int, *, labelled: bool, seed: int = 0) -> Batch:
    """Searches whose truth was drawn by the formulas that are fitted."""
    generator = np.random.default_rng(seed)
    people = np.exp(generator.uniform(np.log(5), np.log(60), count)).astype(np.int64)
    scores = np.full((count, people.max()), -1e4)
    for row, number in enumerate(people):
        scores[row, :number] = 1.5 * generator.standard_normal(number) + 1
    shapes = np.column_stack(
        [np.ones(count), generator.normal(0, 0.4, count), np.log(generator.integers(1, 5, count))]
    )
    offsets = np.column_stack(
        [np.ones(count), np.log(people), generator.random(count), generator.random(count)]
    )
    batch = Batch(
        labelled=labelled,
        scores=scores,
        first=scores.argmax(axis=1),
        right=np.zeros(count, np.bool_),
        truth=np.full(count, -1),
        present=np.zeros(count, np.bool_),
        shapes=shapes,
        offsets=offsets,
    )
    truth = np.array(TRUTH)
    slopes = np.exp(shapes @ truth[:3])
    weights = np.exp(slopes[:, None] * scores - (offsets @ truth[3:])[:, None])
    if not labelled:
        first, everything = weights.max(axis=1), weights.sum(axis=1)
        right = generator.random(count) < first / (1 + first)
        present = generator.random(count) < everything / (1 + everything)
        return replace(batch, right=right, present=present)
    outcomes = np.column_stack([weights, np.ones(count)])
    outcomes = np.cumsum(outcomes / outcomes.sum(axis=1, keepdims=True), axis=1)
    column = (generator.random(count)[:, None] > outcomes).sum(axis=1)
    present = column < scores.shape[1]
    column = np.where(present, column, -1)
    return replace(batch, truth=column, present=present, right=column == batch.first)


@pytest.mark.parametrize("labelled", [True, False])
def test_parameters_are_found_again(labelled: bool) -> None:
    batch = drawn_from_the_model(8000, labelled=labelled)
    found = fitted(batch)
    np.testing.assert_allclose(found, TRUTH, atol=0.3)
    assert loss(found, batch)[0] <= loss(np.array(TRUTH), batch)[0] + 1e-3


@pytest.mark.parametrize("labelled", [True, False])
def test_gradients_are_those_of_the_loss(labelled: bool) -> None:
    batch = drawn_from_the_model(50, labelled=labelled)
    for start in (*STARTS, TRUTH):
        error = check_grad(
            lambda p: loss(p, batch)[0], lambda p: loss(p, batch)[1], np.array(start)
        )
        assert error < 1e-5


def test_a_stuck_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No start moves from where it is: the losses differ."""
    batch = drawn_from_the_model(200, labelled=True)
    monkeypatch.setattr("training.calibration.posterior.STEPS", 0)
    with pytest.raises(DatasetError, match="ends at other losses from other starts"):
        fitted(batch)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_fit_is_of_what_the_service_computes(folds: list[Fold], labelled: bool) -> None:
    facts = RankingFacts(
        prior_items=30,
        between=dict.fromkeys(("rgb rgb", "rgb ir", "ir rgb", "ir ir"), (0.5, 0.1)),
    )
    choice = choose_reranking(folds, facts, modulated=True, count=5)
    found = [
        fold.reranked(one, facts, choice.chosen, labelled=labelled)
        for fold in folds
        for one in fold.scored(30, modulated=True)
    ]
    if labelled:
        assert max(one.raised for one in found) > 0
    names = "slope", "spread", "images", "offset", "size", "own", "raised"
    values = dict(zip(names, TRUTH, strict=True)) | {"slope": math.exp(TRUTH[0])}
    search = {"modulated": True, "reranked": True, "labelled": labelled}
    fit = PosteriorFit.model_validate(search | values)
    batch = batch_of(found, labelled=labelled)
    expected = first_probability(np.array(TRUTH), batch)
    for one, probability, right in zip(found, expected, batch.right, strict=True):
        people = one.people if labelled else np.full(len(one.scores), -1)
        searched = one.searched(labelled=labelled)
        answer = posterior(one.scores, people, searched, labelled=fit, unlabelled=fit)
        first = int(one.scores.argmax())
        assert answer.probabilities[first] == pytest.approx(probability, rel=1e-9)
        assert right == (one.people[first] == one.search.asked)


def test_few_searches_that_scores_separate_stay_finite(folds: list[Fold]) -> None:
    fold = folds[0]
    present = [
        Scored(replace_search(s, fold), np.where(fold.people[s.items] == s.asked, 9.0, 0.0),
               fold.people[s.items], 1.0, 0.0)
        for s in fold.searches[:12]
    ]  # fmt: skip
    judged = fit_posterior(
        [present[:6], present[6:]], modulated=True, reranked=False, labelled=True
    )
    assert np.isfinite([judged.fit.slope, judged.fit.offset]).all()
    assert judged.fit.log_loss < 1


def replace_search(search: Search, fold: Fold) -> Search:
    return replace(search, present=bool((fold.people[search.items] == search.asked).any()))


def test_everything_is_fitted_and_finite(tiny_model: CMT) -> None:
    sets = [made_up(tiny_model, FEWEST, seed=seed) for seed in (1, 2)]
    held_out = together(sets, DatasetName.SYSU)
    references = {
        modality: held_out.rows(np.flatnonzero(held_out.infrared == (modality == "ir"))[:20])
        for modality in MODALITIES
    }
    told: list[str] = []
    fit = fit_ranking(tiny_model, held_out, references, told.append)
    assert fit is not None
    assert "re-ranking" in told
    facts = RankingFacts.model_validate_json(fit.facts.model_dump_json())
    assert facts == fit.facts
    assert facts.prior_items in (10, 30, 100)
    assert sorted(facts.between) == ["ir ir", "ir rgb", "rgb ir", "rgb rgb"]
    wanted = {(m, r, named) for m in (0, 1) for r in (0, 1) for named in (0, 1)}
    assert {(f.modulated, f.reranked, f.labelled) for f in facts.posteriors} == wanted
    assert len(facts.agreements) == 4  # pairs of modalities
    assert min(slope for a in facts.agreements for slope in a.slopes) >= 0
    assert [row.items for row in fit.extrapolated] == [100, 10_000, 1_000_000]
    assert "NaN" not in json.dumps(fit.to_json())
    plain = facts.posterior(modulated=False, reranked=False, labelled=True)
    assert plain is not None
    assert plain.log_loss < 1.2  # knowing nothing but how many people there are costs 1.6


def test_probabilities_fall_with_the_size_of_the_gallery(
    tiny_model: CMT, folds: list[Fold]
) -> None:
    fit = PosteriorFit(modulated=False, reranked=False, labelled=True, slope=2, offset=3, size=1)
    small, large = extrapolate(folds, fit, 30, modulated=False, sizes=(20, 5000), count=20)
    assert large.probability < small.probability
    assert 0 <= large.enrolled <= 1
    assert small.searches == 40


def test_distances_among_references_leave_out_each_to_itself() -> None:
    x = torch.eye(3).view(3, 1, 3)
    found = between_references({"rgb": x, "ir": 2 * x[:1]}, "euclidean")
    assert found["rgb rgb"] == pytest.approx((2**0.5, 1.0))  # all are equal
    assert found["ir rgb"][0] == pytest.approx((1 + 2 * 5**0.5) / 3)
    assert "ir ir" not in found


def test_strength_is_above_zero_and_what_it_does_is_shown(
    tiny_model: CMT, held_out: HeldOut, tiny_config: CMTConfig
) -> None:
    trained = tiny_model.modulation(held_out.embedding)
    choice = choose_strength(tiny_model, held_out)
    assert tiny_model.strength is None
    assert choice.chosen is not None
    assert choice.chosen.c == pytest.approx(trained.gamma.mean().item(), rel=1e-5)
    assert [step.s for step in choice.steps] == [0, *(n / 10 for n in range(1, 11))]
    assert choice.steps[0].changed == [0, 0]
    means = {step.s: (np.mean(step.mean_ap), np.mean(step.changed)) for step in choice.steps}
    able = {s: mean_ap for s, (mean_ap, changed) in means.items() if s > 0 and changed >= 0.3}
    assert choice.enough == bool(able)
    if able:
        assert means[choice.chosen.s][0] == max(able.values())
    plain = CMT(tiny_config.model_copy(update={"instance_alignment": False})).eval()
    assert choose_strength(plain, held_out).chosen is None
