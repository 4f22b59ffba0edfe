"""Shards answer as one process does: the same items in the same order, with the same numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.errors import GalleryFull, MemoryExhausted, ModelVersionConflict, ShardsMissing
from service.gallery import Filters, Gallery, ItemUpdate
from service.gallery.index import features as index_features
from service.images.decode import Crop
from service.kit.device_loss import on_device_loss
from service.scale.engine import gpu_share
from tests.paths import ROOT
from tests.service.processes import wait_for
from tests.service.scale.crews import (
    assert_equal,
    features,
    fill,
    info,
    new_items,
    open_sharded,
    queries,
)


@pytest.mark.parametrize(
    ("count", "shards", "metric", "facts"),
    [
        (1, 2, "euclidean", True),
        (40, 5, "euclidean", True),
        (40, 5, "cosine", False),
        (900, 3, "euclidean", True),
        (900, 3, "euclidean", False),
        (900, 3, "cosine", True),
        (5200, 2, "euclidean", True),  # too many for distances to all, in one process alone
    ],
)
def test_ranking_is_that_of_one_process(
    tmp_path: Path, count: int, shards: int, metric: str, facts: bool
) -> None:
    about, asked = info(metric), queries(count, seed=count, facts=facts)
    with_all = Gallery.open(tmp_path, about, candidates=40)
    fill(with_all, count, seed=count)
    whole = with_all.search_all(asked)
    with_all.close()
    gallery, _crew = open_sharded(tmp_path, about, shards)
    assert_equal(gallery.search_all(asked), whole)
    gallery.close()


def test_missing_shards_are_counted_or_refused(tmp_path: Path) -> None:
    gallery, crew = open_sharded(tmp_path, info(), 3)
    fill(gallery, 60, seed=1)
    asked = queries(60, seed=1)
    everything = gallery.search_all(asked)
    assert {(one.shards_ok, one.shards_total) for one in everything} == {(3, 3)}
    wait_for(lambda: gallery.statistics.items == everything[0].searched, "sizes are not asked")
    crew.missing = {1}
    partial = gallery.search_all(asked)
    assert {(one.shards_ok, one.shards_total) for one in partial} == {(2, 3)}
    assert 0 < partial[0].searched < everything[0].searched
    assert gallery.presence == (2, 3)
    gallery.check()  # what answers is in step
    crew.missing = {0, 1, 2}
    with pytest.raises(ShardsMissing, match="only 0 of 3 shards"):
        gallery.search_all(asked)
    assert gallery.statistics.items  # as last known
    gallery.close()

    gallery, crew = open_sharded(tmp_path, info(), 2, partial=False)
    assert gallery.search_all(asked[:1])[0].shards_ok == 2
    crew.missing = {0}
    with pytest.raises(ShardsMissing, match=r"only 1 of 2 shards.*try again") as missing:
        gallery.search_all(asked)
    assert "Retry-After" in missing.value.headers  # by which our clients come again
    with pytest.raises(ShardsMissing):
        gallery.check()
    gallery.close()


def test_the_document_names_what_missing_shards_do() -> None:
    document = json.loads((ROOT / "docs" / "openapi.json").read_text())
    for path, method in (("/query", "post"), ("/readyz", "get")):
        refused = document["paths"][path][method]["responses"]["503"]
        assert f"`{ShardsMissing.code}`" in refused["description"]


def test_a_search_sees_what_was_written_before_it(tmp_path: Path) -> None:
    gallery, _ = open_sharded(tmp_path, info(), 3)
    rows, new = features(30, seed=5).half().float(), new_items(30, seed=5)
    for place in range(30):
        (item,) = gallery.add(new[place : place + 1], rows[place : place + 1])
        (first,) = gallery.search(rows[place], None, top_k=1).hits
        assert first.distance == 0
        if place % 3 == 0:  # the newest item goes, and with it the newest number
            gallery.delete(item.id)
            hits = gallery.search(rows[place], None, top_k=60).hits
            assert item.id not in [hit.item.id for hit in hits]
        elif place % 3 == 1:
            gallery.update(item.id, ItemUpdate(person_id=f"new {place}"))
            found = gallery.search(
                rows[place], None, top_k=60, filters=Filters(person_id=(f"new {place}",))
            )
            assert [hit.item.id for hit in found.hits] == [item.id]
    assert gallery.search(rows[0], None, top_k=1).searched == 20
    gallery.close()


def test_embedding_again_starts_shards_of_the_new_checkpoint(tmp_path: Path) -> None:
    gallery, before = open_sharded(tmp_path, info(), 2)
    fill(gallery, 40, seed=3)
    after = replace(info(), fingerprint="b" * 64)

    def embed(crops: Sequence[Crop]) -> torch.Tensor:
        return torch.stack([features(8, 4)[0 if one.modality == "ir" else 1] for one in crops])

    gallery.reembed(after, embed)
    with pytest.raises(ModelVersionConflict):
        gallery.search(features(8, 4)[0], None, top_k=1, model="a" * 64)
    found = gallery.search(features(8, 4)[0].half().float(), None, top_k=40)
    assert found.shards_ok == 2
    distances = [hit.distance for hit in found.hits if hit.item.modality == "ir"]
    assert distances == [0] * len(distances)
    assert 0 < len(distances) < found.searched
    assert before.closed
    gallery.check()
    gallery.close()


def test_what_no_shard_can_hold_is_not_enrolled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery, _ = open_sharded(tmp_path, info(), 3)
    fill(gallery, 60, seed=1)
    rows, new = features(1, seed=2), new_items(1, seed=2)
    with monkeypatch.context() as full:
        full.setattr("service.gallery.index.room.host_room", lambda: 0)

        def refused() -> bool:
            try:
                gallery.add(new, rows)
            except GalleryFull as error:
                return "nothing is stored; delete items" in error.detail
            return False

        wait_for(refused, "it is still enrolled")
        before = len(gallery)
        assert refused()
        assert len(gallery) == before
        assert gallery.presence == (3, 3)  # nothing is missing
    wait_for(lambda: not refused(), "nothing is enrolled again")
    gallery.check()
    gallery.close()


def test_a_shard_without_memory_for_its_share_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Gallery.open(tmp_path, info(), candidates=40)
    fill(alone, 60, seed=1)
    asked = queries(60, seed=1)
    whole = alone.search_all(asked)
    searched = alone.search(features(1, 2)[0], None, top_k=1).searched
    alone.close()
    left = [2]  # chunks: one of three shards gets none

    def room() -> int:
        left[0] -= 1
        return 1 << 30 if left[0] >= 0 else 0

    with monkeypatch.context() as full:
        full.setattr(index_features, "host_room", room)
        gallery, crew = open_sharded(tmp_path, info(), 3)
        wait_for(lambda: gallery.presence == (2, 3), "no shard is full")
        answer = gallery.search(features(1, 2)[0], None, top_k=60)
        assert (answer.shards_ok, answer.shards_total) == (2, 3)
        assert 0 < answer.searched < searched
        told = rf"1 of 3 shards .* lack memory for {searched - answer.searched} items"
        with pytest.raises(MemoryExhausted, match=told):
            gallery.check()
        gallery.delete(answer.hits[0].item.id)  # is followed all the same
        again = gallery.search(features(1, 2)[0], None, top_k=60)
        assert [hit.item.id for hit in again.hits] == [hit.item.id for hit in answer.hits[1:]]
        gallery.close()
        left[0] = 2
        gallery, crew = open_sharded(tmp_path, info(), 3, partial=False)
        with pytest.raises(ShardsMissing, match=r"1 of 3 shards .* lack memory for some items"):
            gallery.search_all(asked)
    assert crew.present == 3
    wait_for(lambda: gallery.presence == (3, 3), "memory that is free again is not used")
    gallery.check()
    assert len(gallery.search_all(asked)) == len(whole)
    gallery.close()


def test_a_shard_reports_that_its_gpu_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery, _ = open_sharded(tmp_path, info(), 2)
    lost = "CUDA error: an illegal memory access was encountered"

    def search(*_: object) -> None:
        raise RuntimeError(lost)

    told: list[str] = []
    with monkeypatch.context() as broken, on_device_loss(told.append):
        broken.setattr("service.gallery.index.searcher.Searcher.search", search)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            gallery.search(features(1, 2)[0], None, top_k=1)
        assert told == [lost]
    gallery.close()


@pytest.mark.parametrize(
    ("shards", "gpus", "share"), [(1, 1, 1), (2, 4, 1), (3, 2, 0.5), (4, 1, 0.25), (7, 3, 0.3333)]
)
def test_shards_divide_gpus_into_equal_parts(shards: int, gpus: int, share: float) -> None:
    assert gpu_share(shards, gpus) == share
    assert gpus * int(1 / share) >= shards  # and no part lies on two
