"""What must hold between the numbers of an answer: order, probabilities, prior, shortlists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from model import Modulation
from model.config import MODALITIES, Modality
from model.modulation import ranking_distance
from model.ranking import moments_of
from service.gallery import Filters, Gallery, Hit, NewItem, Options, Query, Scale, SearchResult
from tests.service.gallery.test_search import DIM, PARTS, crop, features, info, query
from tests.service.rankings import ranking_facts

FACTS = ranking_facts(PARTS)
REFERENCES: dict[Modality, Tensor] = {"rgb": features(128, seed=91), "ir": features(128, seed=92)}
PICTURES = {modality: crop(modality) for modality in MODALITIES}
SHARED = 0.45  # of a crop's features with those of other crops of its person
People = Sequence[str | None]


def crops_of(people: People, modalities: Sequence[Modality], seed: int = 0) -> Tensor:
    """Features that those of one person have partly in common; infrared ones are farther off."""
    names = sorted({name for name in people if name})
    centers = dict(zip(names, features(len(names), seed=1000 + seed), strict=True))
    y = features(len(people), seed=seed)
    for i, name in enumerate(people):
        if name:
            y[i] = SHARED**0.5 * centers[name] + (1 - SHARED) ** 0.5 * y[i]
        if modalities[i] == "ir":
            y[i] *= 1.3
    return y


def filled(
    folder: Path, people: People, modalities: Sequence[Modality], y: Tensor, **options: Any
) -> Gallery:
    gallery = Gallery.open(folder, info(**options))
    gallery.add(
        [NewItem(PICTURES[m], person_id=p) for p, m in zip(people, modalities, strict=True)], y
    )
    return gallery


def asked(
    gallery: Gallery, x: Tensor, modulation: Modulation | None, *, rerank: bool = False,
    prior: float = 0.5, query: str = "ir", images: int = 1, metric: str = "euclidean",
    facts: Any = FACTS, **options: Any,
) -> Query:  # fmt: skip
    """A query of a checkpoint with these facts."""
    applied = Modulation(*(p.double() for p in modulation or Modulation.identity(1, DIM)))
    distances = {
        m: ranking_distance(x[None].double(), y.double(), applied, metric)[0].numpy()  # type: ignore[arg-type]
        for m, y in REFERENCES.items()
    }
    scale = Scale(
        references={m: moments_of(found) for m, found in distances.items()},
        facts=facts,
        modulated=modulation is not None,
        images=images,
        prior=prior,
        rerank=rerank,
        query=query,
    )
    return Query(x, modulation, Options(**{"top_k": 20, **options}), scale)


Ask = Callable[..., SearchResult]


def asking(gallery: Gallery, x: Tensor, modulation: Modulation | None) -> Ask:
    return lambda **options: gallery.search_all([asked(gallery, x, modulation, **options)])[0]


def near(y: Tensor, seed: int, noise: float = 0.7) -> Tensor:
    """A query that shows who `y` shows."""
    return math.sqrt(1 - noise**2) * y + noise * features(1, seed=seed)[0]


def probabilities(result: SearchResult) -> list[float]:
    found = [hit.probability for hit in result.hits]
    assert all(p is not None and 0 <= p <= 1 for p in found)
    return [p for p in found if p is not None]


def by_person(result: SearchResult) -> dict[str, float]:
    """Everybody's probability, the same by all images of a person."""
    found: dict[str, float] = {}
    for hit, p in zip(result.hits, probabilities(result), strict=True):
        if hit.item.person_id is not None:
            assert found.setdefault(hit.item.person_id, p) == p
    return found


def odds(p: float) -> float:
    return p / (1 - p)


def numbers(hits: Sequence[Hit]) -> list[tuple[str, float, float, float | None]]:
    return [(hit.item.id, hit.distance, hit.score, hit.probability) for hit in hits]


KINDS: tuple[Modality, ...] = ("rgb", "ir")
NAMED = [f"p{i % 60}" for i in range(300)]
BOTH: list[Modality] = [KINDS[i % 3 == 0] for i in range(300)]
WAYS: list[dict[str, Any]] = [
    {},
    {"rerank": True},
    {"exhaustive": True},
    {"rerank": True, "exhaustive": True, "candidates": 30},
]


@pytest.fixture(scope="module", params=["modulated", "unmodulated"])
def named(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ask]:
    """A gallery of 60 people in five images each, of both modalities."""
    y = crops_of(NAMED, BOTH)
    modulation = query(3)[1] if request.param == "modulated" else None
    with closing(filled(tmp_path_factory.mktemp("named"), NAMED, BOTH, y)) as gallery:
        yield asking(gallery, near(y[7], seed=5), modulation)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """A gallery where half of the images have no label."""
    people = [name if i % 2 else None for i, name in enumerate(NAMED)]
    y = crops_of(NAMED, BOTH)
    with closing(filled(tmp_path_factory.mktemp("mixed"), people, BOTH, y)) as gallery:
        yield asking(gallery, near(y[8], seed=5), query(3)[1])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """9,000 images of 3,000 people, more of either modality than are counted one by one."""
    people = [f"p{i % 3000}" for i in range(9_000)]
    modalities = [KINDS[i % 9000 >= 4500] for i in range(9_000)]
    y = crops_of(people, modalities)
    with closing(filled(tmp_path_factory.mktemp("large"), people, modalities, y)) as gallery:
        yield asking(gallery, near(y[11], seed=6), query(4)[1])


@pytest.mark.parametrize("way", WAYS)
def test_score_orders_and_one_number_per_person(named: Ask, way: dict[str, Any]) -> None:
    result = named(top_k=300, **way)
    scores = [hit.score for hit in result.hits]
    assert scores == sorted(scores, reverse=True)
    assert (result.people, result.searched) == (60, 300)
    everyone = by_person(result)
    grouped = named(top_k=300, group_by="person_id", **way)
    assert by_person(grouped) == pytest.approx(everyone)
    falling = probabilities(grouped)
    assert falling == sorted(falling, reverse=True)
    assert len(falling) == 60
    assert grouped.probability_enrolled is not None
    assert sum(falling) == pytest.approx(grouped.probability_enrolled, abs=1e-9)
    assert falling[0] <= grouped.probability_enrolled <= 1
    assert falling[0] > falling[1]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_hidden_changes_no_probability(named: Ask, way: dict[str, Any]) -> None:
    everything = named(top_k=300, **way)
    for top_k in (1, 7, 100):
        fewer = named(top_k=top_k, **way)
        assert numbers(fewer.hits) == numbers(everything.hits[:top_k])
        assert fewer.probability_enrolled == everything.probability_enrolled
    limit = everything.hits[9].distance
    nearer = named(top_k=300, max_distance=limit, **way)
    assert numbers(nearer.hits) == numbers([h for h in everything.hits if h.distance <= limit])
    assert nearer.probability_enrolled == everything.probability_enrolled
    infrared = named(top_k=300, filters=Filters(gallery_modality=("ir",)), **way)
    assert infrared.probability_enrolled != everything.probability_enrolled
    assert sum(by_person(infrared).values()) == pytest.approx(infrared.probability_enrolled)


@pytest.mark.parametrize("modality", MODALITIES)
def test_in_one_modality_the_order_is_by_distance(named: Ask, modality: Modality) -> None:
    result = named(top_k=300, filters=Filters(gallery_modality=(modality,)))
    distances = [hit.distance for hit in result.hits]
    assert distances == sorted(distances)
    assert len({hit.score for hit in result.hits}) == len(set(distances))
    assert {hit.item.modality for hit in result.hits} == {modality}


def test_neither_modality_starves_the_other(tmp_path: Path) -> None:
    """All visible items are nearer than any infrared one, and ten to one."""
    facts = FACTS.model_copy(update={"prior_items": 0.01})  # only this gallery says what is near
    modalities: list[Modality] = [KINDS[i < 60] for i in range(660)]
    y = features(660)
    y[:60] *= 3
    with closing(filled(tmp_path, [None] * 660, modalities, y)) as gallery:
        ask = asking(gallery, 0.3 * y[2] + 0.3 * features(1, seed=1)[0], None)
        everything = ask(top_k=660, facts=facts).hits
        nearest = sorted(everything, key=lambda hit: hit.distance)
        assert {hit.item.modality for hit in nearest[:600]} == {"rgb"}
        result = ask(top_k=20, candidates=10, facts=facts)
        assert result.candidates == 2 * 20
        assert result.hits[0].item.modality == "ir"
        alone = ask(top_k=20, facts=facts, filters=Filters(gallery_modality=("ir",)))
        assert result.hits[0].item == alone.hits[0].item
        assert {hit.item.modality for hit in result.hits} == {"rgb", "ir"}


def test_unlabelled_items_do_not_rise_and_do_not_exclude_each_other(mixed: Ask) -> None:
    for way in WAYS:
        result = mixed(top_k=300, **way)
        found = probabilities(result)
        alone = [p for p, h in zip(found, result.hits, strict=True) if h.item.person_id is None]
        assert alone == sorted(alone, reverse=True)
        assert (len(alone), result.people) == (150, 150 + 30)
        grouped = mixed(top_k=300, group_by="person_id", **way)
        people = list(by_person(grouped).values())
        assert people == sorted(people, reverse=True)
        assert len(grouped.hits) == 180
        assert grouped.probability_enrolled is not None
        assert max(found) <= grouped.probability_enrolled


@pytest.mark.parametrize("rerank", [False, True])
@pytest.mark.parametrize("prior", [0.01, 0.3, 0.95])
def test_odds_follow_the_prior(named: Ask, rerank: bool, prior: float) -> None:
    even, other = (named(rerank=rerank, prior=p) for p in (0.5, prior))
    assert [h.item.id for h in even.hits] == [h.item.id for h in other.hits]
    assert even.probability_enrolled is not None
    assert other.probability_enrolled is not None
    expected = odds(even.probability_enrolled) * odds(prior)
    assert odds(other.probability_enrolled) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rerank", [False, True])
def test_shortlists_of_any_length_say_the_same(large: Ask, rerank: bool) -> None:
    ways: list[dict[str, Any]] = [
        {"candidates": 100},
        {"candidates": 1000},
        {"exhaustive": True},
        {},
    ]
    answers = [large(rerank=rerank, **way) for way in ways]
    assert len({result.hits[0].item.id for result in answers}) == 1
    firsts = [probabilities(result)[0] for result in answers]
    assert max(firsts) - min(firsts) < 0.02
    assert 0.02 < firsts[0] < 0.999
    enrolled = [result.probability_enrolled or 0 for result in answers]
    assert max(enrolled) - min(enrolled) < 0.05
    assert all(first <= e for first, e in zip(firsts, enrolled, strict=True))


@pytest.mark.parametrize("rerank", [False, True])
def test_more_results_of_a_large_gallery_have_the_same_numbers(large: Ask, rerank: bool) -> None:
    """Those that are shown, and those that groups needed, beyond the shortlist count as before."""
    few, many = large(top_k=5, rerank=rerank), large(top_k=1000, rerank=rerank)
    assert numbers(few.hits) == numbers(many.hits[:5])
    assert few.probability_enrolled == many.probability_enrolled
    grouped = large(top_k=1000, group_by="person_id", rerank=rerank)
    assert grouped.probability_enrolled == few.probability_enrolled
    assert grouped.people == 3000
    falling = probabilities(grouped)
    assert falling == sorted(falling, reverse=True)
    assert len(falling) == 1000
    together = by_person(many)
    assert all(by_person(grouped)[name] == pytest.approx(p) for name, p in together.items())


def test_reranking_says_where_an_item_was_before(named: Ask) -> None:
    plain, again = (named(top_k=300, explain=True, rerank=rerank) for rerank in (False, True))
    places = {hit.item.id: hit.rank for hit in plain.hits}
    assert [hit.rank_before_rerank for hit in plain.hits] == [hit.rank for hit in plain.hits]
    assert [hit.rank_before_rerank for hit in again.hits] == [places[h.item.id] for h in again.hits]
    assert [h.item.id for h in again.hits] != [h.item.id for h in plain.hits]
    distances = {hit.item.id: hit.distance for hit in plain.hits}
    assert all(hit.distance == distances[hit.item.id] for hit in again.hits)
    assert plain.timings_ms["rerank"] == 0 < again.timings_ms["rerank"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("people", "modalities"),
    [
        (["ann"], ["rgb"]),
        ([None], ["ir"]),
        (["ann", "bob"], ["rgb", "ir"]),
        ([None, "bob"], ["rgb", "ir"]),
        (["ann"] * 5, ["rgb", "ir", "ir", "rgb", "rgb"]),
        (["ann", "bob", None], ["rgb"] * 3),
    ],
)
@pytest.mark.parametrize("alike", [False, True])
def test_the_smallest_galleries_have_finite_numbers(
    tmp_path: Path, people: People, modalities: list[Modality], metric: str, alike: bool,
    way: dict[str, Any],
) -> None:  # fmt: skip
    """alike: every item is the query itself."""
    y = features(1).repeat(len(people), 1, 1) if alike else features(len(people))
    with closing(filled(tmp_path, people, modalities, y, metric=metric)) as gallery:
        x = y[0].half().float()
        for modulation in (None, query()[1]):
            for facts in (FACTS, None):
                ask = asking(gallery, x, modulation)
                result = ask(metric=metric, facts=facts, explain=True, **way)
                assert len(result.hits) == len(people)
                for hit in result.hits:
                    assert math.isfinite(hit.score)
                    assert math.isfinite(hit.distance)
                if facts is None:
                    assert {hit.probability for hit in result.hits} == {None}
                    assert result.probability_enrolled is None
                else:
                    assert max(probabilities(result)) <= (result.probability_enrolled or 0) <= 1
                nobody = ask(
                    metric=metric, facts=facts, filters=Filters(person_id=("nobody",)), **way
                )
                assert (nobody.hits, nobody.searched, nobody.people) == ([], 0, 0)
                assert nobody.probability_enrolled == 0


def test_cosine_answers_by_its_own_distances(tmp_path: Path) -> None:
    y = crops_of(NAMED, BOTH)
    with closing(filled(tmp_path, NAMED, BOTH, y, metric="cosine")) as gallery:
        ask = asking(gallery, near(y[7], seed=5), query(3)[1])
        for rerank in (False, True):
            result = ask(top_k=300, metric="cosine", rerank=rerank, explain=True)
            assert result.exhaustive
            assert all(hit.parts is None for hit in result.hits)
            assert sum(by_person(result).values()) == pytest.approx(result.probability_enrolled)
            few = ask(top_k=3, metric="cosine", rerank=rerank, explain=True)
            assert numbers(few.hits) == numbers(result.hits[:3])


@pytest.mark.parametrize("count", [300, 12_000])
def test_queries_together_answer_as_each_alone(tmp_path: Path, count: int) -> None:
    """Also where a modality is so large that only a sample is measured."""
    named, both = NAMED * (count // 300), BOTH * (count // 300)
    y = crops_of(named, both)
    with closing(filled(tmp_path, named, both, y)) as gallery:
        several = [
            asked(gallery, near(y[i], seed=i), query(i)[1] if i % 2 else None, **options)
            for i, options in enumerate(
                [*WAYS, *WAYS, {"candidates": 5}, {"group_by": "person_id"}]
            )
        ]
        filtered = replace(
            several[1],
            options=replace(several[1].options, filters=Filters(person_id=("p1", "p2"))),
        )
        several.append(filtered)
        together = gallery.search_all(several)
        for one, answer in zip(several, together, strict=True):
            (alone,) = gallery.search_all([one])
            assert numbers(alone.hits) == numbers(answer.hits)
            assert alone.probability_enrolled == answer.probability_enrolled


def test_scores_are_comparable_between_modalities(named: Ask) -> None:
    """Each is in deviations from the mean of its modality: the medians are about equal."""
    hits = named(top_k=300).hits
    of = {m: np.array([h.score for h in hits if h.item.modality == m]) for m in MODALITIES}
    away = {m: np.array([h.distance for h in hits if h.item.modality == m]) for m in MODALITIES}
    assert abs(np.median(of["rgb"]) - np.median(of["ir"])) < 0.5
    assert abs(np.median(away["rgb"]) - np.median(away["ir"])) > 1
