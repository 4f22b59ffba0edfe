"""The ranking: exact against plain float64 loops, filters before the shortlist, groups, threads."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model import CheckpointInfo, CMTConfig, Modulation
from service.gallery import Filters, Gallery, ItemUpdate, NewItem, SearchResult
from service.gallery.storage.replicas import Replicas
from service.images.decode import Crop, decode

COUNT, PARTS, DIM = 300, 6, 16
START = datetime(2026, 1, 1, tzinfo=UTC)


def crop(modality: str = "rgb") -> Crop:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 32)).save(buffer, "PNG")
    return decode(buffer.getvalue(), modality=modality)  # type: ignore[arg-type]


def features(count: int = COUNT, seed: int = 0) -> Tensor:
    return torch.randn(count, PARTS, DIM, generator=torch.Generator().manual_seed(seed))


def query(seed: int = 1) -> tuple[Tensor, Modulation]:
    """x P×D with γ around 1 and β around 0, as a trained generator gives them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(PARTS, DIM, generator=generator)
    gamma = 1 + 0.5 * torch.randn(1, DIM, generator=generator)
    beta = 0.3 * torch.randn(1, DIM, generator=generator)
    return x, Modulation(gamma, beta)


def plain_parts(x: Tensor, y: Tensor, modulation: Modulation) -> np.ndarray:
    """‖x_i − (γ⊙y_i + β)‖² by loops in float64 over what is stored (fp16): N×P."""
    gamma, beta = (p[0].double().tolist() for p in modulation)
    rows = y.half().double().tolist()
    parts = x.double().tolist()
    return np.array(
        [
            [
                sum((parts[i][d] - (gamma[d] * row[i][d] + beta[d])) ** 2 for d in range(DIM))
                for i in range(PARTS)
            ]
            for row in rows
        ]
    )


def new_items(count: int = COUNT) -> list[NewItem]:
    """Nine persons of 30 images and 30 of none; four cameras and none; IR every third; hourly."""
    pictures = {modality: crop(modality) for modality in ("rgb", "ir")}
    return [
        NewItem(
            pictures["ir" if i % 3 == 0 else "rgb"],
            person_id=None if i % 10 == 9 else f"p{i % 9}",
            camera_id=None if i % 5 == 4 else f"c{i % 5}",
            captured_at=None if i % 7 == 6 else START + timedelta(hours=i),
        )
        for i in range(count)
    ]


def info(metric: str = "euclidean") -> CheckpointInfo:
    config = CMTConfig(
        input_height=96,
        input_width=48,
        dim=DIM,
        heads=2,
        metric=metric,  # type: ignore[arg-type]
    )
    return CheckpointInfo("a" * 64, config)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    opened = Gallery.open(tmp_path_factory.mktemp("data"), info(), candidates=40)
    opened.add(new_items(), features())
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def ids(gallery: Gallery) -> list[str]:
    return [item.id for item in gallery.list(Filters(), 1000).items]


def found(result: SearchResult, ids: list[str]) -> list[int]:
    return [ids.index(hit.item.id) for hit in result.hits]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("exhaustive", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_ranking_is_that_of_the_plain_loops(
    gallery: Gallery, ids: list[str], seed: int, exhaustive: bool, modulated: bool
) -> None:
    x, modulation = query(seed)
    result = gallery.search(
        x, modulation if modulated else None, top_k=20, exhaustive=exhaustive, explain=True
    )
    used = modulation if modulated else Modulation.identity(1, DIM)
    parts = plain_parts(x, features(), used)
    plain = plain_parts(x, features(), Modulation.identity(1, DIM))
    distances = np.sqrt(parts.sum(1))
    order = np.argsort(distances, kind="stable")[:20]
    assert found(result, ids) == order.tolist()
    for hit, place in zip(result.hits, order, strict=True):
        assert hit.distance == pytest.approx(distances[place], rel=1e-6)
        assert hit.parts is not None
        assert hit.parts == pytest.approx(parts[place].tolist(), rel=1e-5)
        assert sum(hit.parts) == pytest.approx(hit.distance**2, rel=1e-6)
        assert hit.unmodulated_parts == pytest.approx(plain[place].tolist(), rel=1e-5)
    assert [hit.rank for hit in result.hits] == list(range(1, 21))
    assert (result.searched, result.exhaustive) == (COUNT, exhaustive)
    assert result.candidates == (COUNT if exhaustive else 2 * 40)  # of each modality


def test_modulation_changes_the_order(gallery: Gallery, ids: list[str]) -> None:
    x, modulation = query()
    plain = found(gallery.search(x, None, top_k=20), ids)
    assert found(gallery.search(x, modulation, top_k=20), ids) != plain


def test_small_distances_do_not_cancel(tmp_path: Path) -> None:
    """c − ⟨w, z⟩ of large, nearly equal features loses all digits; the answer must not."""
    base = 50 + features(1)
    y = (base + 0.1 * features(200, seed=3)).half().float()
    x = y[17] + 0.01
    gallery = Gallery.open(tmp_path, info(), candidates=200)
    gallery.add(new_items(200), y)
    order = np.argsort(plain_parts(x, y, Modulation.identity(1, DIM)).sum(1))
    ids = [item.id for item in gallery.list(Filters(), 1000).items]
    for exhaustive in (False, True):
        result = gallery.search(x, None, top_k=10, exhaustive=exhaustive)
        assert found(result, ids) == order[:10].tolist()
        assert result.hits[0].distance == pytest.approx(0.01 * (PARTS * DIM) ** 0.5, rel=1e-3)
    gallery.close()


@pytest.mark.parametrize("group_by", [None, "person_id"])
def test_a_full_shortlist_equals_the_exhaustive_answer(
    gallery: Gallery, group_by: str | None
) -> None:
    for seed in range(5):
        x, modulation = query(seed)
        options = {"top_k": COUNT, "group_by": group_by, "explain": True}
        ours = gallery.search(x, modulation, candidates=COUNT, **options)  # type: ignore[arg-type]
        theirs = gallery.search(x, modulation, exhaustive=True, **options)  # type: ignore[arg-type]
        assert [h.item for h in ours.hits] == [h.item for h in theirs.hits]
        assert [h.distance for h in ours.hits] == [h.distance for h in theirs.hits]
        assert [h.unmodulated_rank for h in ours.hits] == [h.unmodulated_rank for h in theirs.hits]
        assert sorted(h.recall_rank or 0 for h in ours.hits)[-1] <= COUNT
        assert all(h.recall_rank is None for h in theirs.hits)


def test_unmodulated_ranks_are_those_among_what_was_scored(
    gallery: Gallery, ids: list[str]
) -> None:
    x, modulation = query()
    plain = plain_parts(x, features(), Modulation.identity(1, DIM)).sum(1)
    result = gallery.search(x, modulation, top_k=40, candidates=40, explain=True)
    distances = plain_parts(x, features(), modulation).sum(1)
    infrared = np.arange(COUNT) % 3 == 0
    shortlist = np.concatenate(
        [np.flatnonzero(kind)[np.argsort(distances[kind])[:40]] for kind in (infrared, ~infrared)]
    )
    expected = [1 + int((plain[shortlist] < plain[place]).sum()) for place in found(result, ids)]
    assert [h.unmodulated_rank for h in result.hits] == expected
    everything = gallery.search(x, modulation, top_k=20, exhaustive=True, explain=True)
    expected = [1 + int((plain < plain[place]).sum()) for place in found(everything, ids)]
    assert [h.unmodulated_rank for h in everything.hits] == expected
    unexplained = gallery.search(x, modulation, top_k=3).hits[0]
    assert (unexplained.unmodulated_rank, unexplained.parts) == (None, None)
    assert unexplained.unmodulated_parts is None


def test_a_long_shortlist_gives_the_best_of_it_however_few_are_rescored(gallery: Gallery) -> None:
    x, modulation = query()
    whole = gallery.search(x, modulation, top_k=COUNT).hits
    few = gallery.search(x, modulation, top_k=5, candidates=COUNT)
    assert few.hits == whole[:5]
    assert few.candidates == few.searched == COUNT


def test_recall_ranks_number_the_shortlist(gallery: Gallery) -> None:
    result = gallery.search(*query(), top_k=40, candidates=40)
    for modality in ("rgb", "ir"):  # each has a shortlist of its own
        ranks = [hit.recall_rank for hit in result.hits if hit.item.modality == modality]
        assert ranks == list(range(1, len(ranks) + 1))
        assert len(ranks) > 5


FILTERS: dict[str, tuple[Filters, Callable[[NewItem], bool]]] = {
    "person": (Filters(person_id=("p3",)), lambda n: n.person_id == "p3"),
    "persons": (Filters(person_id=("p3", "p5", "x")), lambda n: n.person_id in ("p3", "p5")),
    "camera": (Filters(camera_id=("c1",)), lambda n: n.camera_id == "c1"),
    "not cameras": (
        Filters(exclude_camera_id=("c0", "c1", "c2")),
        lambda n: n.camera_id not in ("c0", "c1", "c2"),
    ),
    "infrared": (Filters(gallery_modality=("ir",)), lambda n: n.crop.modality == "ir"),
    "from": (
        Filters(captured_from=START + timedelta(hours=250)),
        lambda n: n.captured_at is not None and n.captured_at >= START + timedelta(hours=250),
    ),
    "to": (
        Filters(captured_to=START + timedelta(hours=3)),
        lambda n: n.captured_at is not None and n.captured_at < START + timedelta(hours=3),
    ),
    "all at once": (
        Filters(
            person_id=("p1", "p2"),
            exclude_camera_id=("c3",),
            gallery_modality=("rgb",),
            captured_from=START,
        ),
        lambda n: (
            n.person_id in ("p1", "p2")
            and n.camera_id != "c3"
            and n.crop.modality == "rgb"
            and n.captured_at is not None
        ),
    ),
    "nothing": (Filters(person_id=("unknown",)), lambda n: False),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("exhaustive", [False, True])
def test_filters_come_before_the_shortlist(
    gallery: Gallery, ids: list[str], name: str, exhaustive: bool
) -> None:
    """With a shortlist of 10, every matching item still comes back when asked for."""
    filters, matches = FILTERS[name]
    allowed = [i for i, new in enumerate(new_items()) if matches(new)]
    x, modulation = query()
    distances = plain_parts(x, features(), modulation).sum(1)
    expected = sorted(allowed, key=lambda place: distances[place])
    options: dict[str, Any] = {"filters": filters, "exhaustive": exhaustive, "candidates": 10}
    few = gallery.search(x, modulation, top_k=5, **options)
    assert found(few, ids) == expected[:5]
    everything = gallery.search(x, modulation, top_k=COUNT, **options)
    assert found(everything, ids) == expected
    assert everything.searched == len(allowed)
    assert gallery.list(filters, 1000).total == len(allowed)
    assert [ids.index(item.id) for item in gallery.list(filters, 1000).items] == allowed


@pytest.mark.parametrize("exhaustive", [False, True])
@pytest.mark.parametrize("top_k", [1, 9, 10, 30, 39, 100])
def test_groups_are_persons_and_lone_items(
    gallery: Gallery, ids: list[str], top_k: int, exhaustive: bool
) -> None:
    """9 persons and 30 items without: 39 groups, found though the shortlist starts at top_k."""
    x, modulation = query()
    distances = plain_parts(x, features(), modulation).sum(1)
    people = [new.person_id or f"item {i}" for i, new in enumerate(new_items())]
    expected: list[int] = []
    for place in np.argsort(distances):
        if people[place] not in {people[e] for e in expected}:
            expected.append(int(place))
    result = gallery.search(
        x, modulation, top_k=top_k, candidates=1, group_by="person_id", exhaustive=exhaustive
    )
    assert found(result, ids) == expected[:top_k]
    assert len(expected) == 39


def hear_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Galleries never hear of what another one writes."""
    monkeypatch.setattr(Replicas, "start", lambda *_: None)
    monkeypatch.setattr("service.gallery.gallery._KEEP_SECONDS", 1e6)
    monkeypatch.setattr("service.gallery.follower.SYNC_SECONDS", 1e6)
    monkeypatch.setattr("service.gallery.follower._STALE", 1e6)


@pytest.mark.parametrize(
    ("filters", "passing"),
    [
        (Filters(person_id=("ann",)), {"ann"}),
        (Filters(camera_id=("gate",)), {"ann", "eve"}),
        (Filters(exclude_camera_id=("hall", "moved")), {"ann", "eve"}),
        (Filters(captured_to=START + timedelta(hours=1)), {"ann", "eve"}),
    ],
)
@pytest.mark.parametrize("exhaustive", [False, True])
def test_labels_changed_by_another_process_do_not_pass_old_filters(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    filters: Filters, passing: set[str], exhaustive: bool,
) -> None:  # fmt: skip
    hear_nothing(monkeypatch)
    places = [tmp_path / name for name in ("a", "b")]
    here, there = (Gallery.open(place, info(), database_url=postgres_url) for place in places)
    try:
        y = features(8)
        new = NewItem(crop(), "ann", "gate", START)
        items = here.add([new] * 8, y)
        there.check()  # follows what is there
        changed = ItemUpdate("bob", "moved", START + timedelta(hours=1))
        for item in items[:5]:
            here.update(item.id, changed)
        here.update(items[5].id, ItemUpdate(person_id="eve"))
        found = there.search(y[0], None, top_k=2, filters=filters, exhaustive=exhaustive)
        assert len(found.hits) == 2  # although the nearest of before are others
        assert {hit.item.person_id for hit in found.hits} <= passing
        assert all(filters.passes(hit.item) for hit in found.hits)
    finally:
        here.close()
        there.close()


def test_one_person_is_one_group_also_after_another_process_renamed_it(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear_nothing(monkeypatch)
    places = [tmp_path / name for name in ("a", "b")]
    here, there = (Gallery.open(place, info(), database_url=postgres_url) for place in places)
    try:
        y = features(3)
        items = here.add([NewItem(crop(), name) for name in ("ann", "bob", "eve")], y)
        there.check()
        here.update(items[1].id, ItemUpdate(person_id="ann"))
        found = there.search(y[0], None, top_k=3, group_by="person_id")
        assert sorted(str(hit.item.person_id) for hit in found.hits) == ["ann", "eve"]
    finally:
        here.close()
        there.close()


def test_max_distance_drops_weaker_results(gallery: Gallery) -> None:
    x, modulation = query()
    all_hits = gallery.search(x, modulation, top_k=40).hits
    limit = all_hits[7].distance
    for group_by in (None, "person_id"):
        near = gallery.search(x, modulation, top_k=40, max_distance=limit, group_by=group_by).hits
        assert near[-1].distance <= limit
        if group_by is None:
            assert near == all_hits[:8]
    assert gallery.search(x, modulation, top_k=5, max_distance=0.0).hits == []


def test_both_stages_run_on_every_default_query(gallery: Gallery) -> None:
    before = gallery.counters.recall_calls, gallery.counters.rescore_calls
    for seed in range(3):
        x, modulation = query(seed)
        gallery.search(x, modulation, top_k=1)
        gallery.search(x, None, top_k=1)
    after = gallery.counters.recall_calls, gallery.counters.rescore_calls
    assert (after[0] - before[0], after[1] - before[1]) == (12, 12)  # of both modalities
    gallery.search(*query(), top_k=1, exhaustive=True)
    assert gallery.counters.recall_calls == after[0]


def test_an_empty_gallery_answers_with_nothing(tmp_path: Path) -> None:
    gallery = Gallery.open(tmp_path, info())
    several: list[dict[str, Any]] = [
        {}, {"exhaustive": True}, {"group_by": "person_id"}, {"explain": True}
    ]  # fmt: skip
    for options in several:
        result = gallery.search(*query(), top_k=5, **options)
        assert (result.hits, result.searched, result.candidates) == ([], 0, 0)
    gallery.close()


@pytest.mark.parametrize("exhaustive", [False, True])
def test_cosine_is_exhaustive_and_exact(tmp_path: Path, exhaustive: bool) -> None:
    gallery = Gallery.open(tmp_path, info("cosine"))
    gallery.add(new_items(), features())
    ids = [item.id for item in gallery.list(Filters(), 1000).items]
    x, (gamma, beta) = query()
    result = gallery.search(
        x, Modulation(gamma, beta), top_k=10, exhaustive=exhaustive, explain=True
    )
    a = x.double().flatten().numpy()
    b = (gamma.double() * features().half().double() + beta.double()).flatten(1).numpy()
    distances = 1 - b @ a / np.linalg.norm(a) / np.linalg.norm(b, axis=1)
    order = np.argsort(distances)[:10]
    assert found(result, ids) == order.tolist()
    assert [h.distance for h in result.hits] == pytest.approx(distances[order].tolist(), rel=1e-9)
    assert result.exhaustive
    assert all(hit.parts is None and hit.unmodulated_rank for hit in result.hits)
    assert all(hit.unmodulated_parts is None for hit in result.hits)
    gallery.close()
