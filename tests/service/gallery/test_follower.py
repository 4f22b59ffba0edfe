"""The memory follows the store whatever happens; its snapshot holds nothing that was erased."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import CheckpointInfo, CMTConfig
from service.errors import DatabaseUnavailable, GalleryFull, IndexOutOfStep, MemoryExhausted
from service.gallery import Gallery, ItemUpdate, NewItem
from service.gallery.feed import Stored
from service.gallery.index.segment import Segment
from service.gallery.storage.store import Store
from service.gallery.storage.streaming import View
from service.kit.device_loss import on_device_loss
from tests.service.stores import crop

CONFIG = CMTConfig(parts=2, dim=16, heads=2)
INFO = CheckpointInfo("a" * 64, CONFIG)
OTHER = CheckpointInfo("b" * 64, CONFIG)


def features(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 16, generator=torch.Generator().manual_seed(seed))


def new(count: int, person: str | None = None) -> list[NewItem]:
    return [NewItem(crop(i), person_id=person) for i in range(count)]


def files_of(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted((folder / "index").rglob("*")) if p.is_file())


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    opened = Gallery.open(tmp_path, INFO)
    yield opened
    opened.close()


def test_a_start_from_a_snapshot_answers_as_one_from_the_store(
    gallery: Gallery, tmp_path: Path
) -> None:
    y = features(200)
    items = gallery.add(new(200, "ann"), y)
    assert gallery.save_index()
    gallery.add(new(20, "bob"), features(20, seed=1))  # after the snapshot
    gallery.close()
    again = Gallery.open(tmp_path, INFO)
    assert len(again) == 220
    again.check()
    for row in (0, 7, 199):
        assert again.search(y[row], None, top_k=1).hits[0].item.id == items[row].id
    assert again.search(features(20, seed=1)[3], None, top_k=1).hits[0].item.person_id == "bob"
    assert (tmp_path / "index" / "MANIFEST").exists()
    again.close()


@pytest.mark.parametrize("change", ["delete", "erase", "rename"])
def test_nothing_erased_is_left_in_the_snapshot(
    gallery: Gallery, tmp_path: Path, change: str
) -> None:
    items = gallery.add([*new(1, "somebody-else"), *new(1, "wanted-man")], features(2))
    assert gallery.save_index()
    assert b"wanted-man" in files_of(tmp_path)
    if change == "delete":
        gallery.delete(items[1].id)
    elif change == "erase":
        assert gallery.delete_where("wanted-man") == 1
    else:
        gallery.update(items[1].id, ItemUpdate(person_id="nobody"))
    assert b"wanted-man" not in files_of(tmp_path)
    assert gallery.save_index()
    assert b"wanted-man" not in files_of(tmp_path)
    assert b"somebody-else" in files_of(tmp_path)


def test_metadata_alone_leaves_the_snapshot(gallery: Gallery, tmp_path: Path) -> None:
    [item] = gallery.add(new(1), features(1))
    assert gallery.save_index()
    gallery.update(item.id, ItemUpdate(metadata={"note": "seen"}))
    assert (tmp_path / "index" / "MANIFEST").exists()


def test_a_database_put_back_is_not_mixed_with_a_newer_snapshot(
    gallery: Gallery, tmp_path: Path
) -> None:
    gallery.add(new(5), features(5))
    gallery.close()
    database = tmp_path / "gallery.sqlite3"
    kept = database.read_bytes()
    gallery = Gallery.open(tmp_path, INFO)
    gallery.add(new(5), features(5, seed=1))
    assert gallery.save_index()
    gallery.close()
    database.write_bytes(kept)
    gallery = Gallery.open(tmp_path, INFO)
    others = gallery.add(new(5), features(5, seed=2))  # the same numbers again
    gallery.close()
    gallery = Gallery.open(tmp_path, INFO)
    gallery.check()
    assert len(gallery) == 10
    for row, item in enumerate(others):
        x = features(5, seed=2)[row]
        assert gallery.search(x, None, top_k=1).hits[0].item.id == item.id
    gallery.close()


def test_a_stream_cut_between_blocks_goes_on_without_doubles(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = View.stream

    def cut(self: View, after: int = 0, block: int = 0) -> Iterator[Stored]:
        blocks = stream(self, after, 4)
        yield next(blocks)
        raise DatabaseUnavailable("the connection broke")

    monkeypatch.setattr(View, "stream", cut)
    gallery.add(new(10), features(10))  # committed, and followed for one block only
    monkeypatch.setattr(View, "stream", stream)
    hits = gallery.search(features(1)[0], None, top_k=100).hits
    assert len({hit.item.id for hit in hits}) == len(hits) == 10
    gallery.check()


def test_memory_that_runs_out_halfway_shifts_nothing(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = gallery.add(new(3), features(3))
    add = Segment.add

    def fail(self: Segment, stored: Stored) -> None:
        monkeypatch.setattr(self.columns, "add", None)  # after the features are in
        try:
            add(self, stored)
        finally:
            monkeypatch.undo()

    monkeypatch.setattr(Segment, "add", fail)
    with pytest.raises(TypeError):
        gallery.add(new(3), features(3, seed=1))
    y = torch.cat([features(3), features(3, seed=1)])
    found = [gallery.search(x, None, top_k=1).hits[0] for x in y]
    assert [hit.item.id for hit in found[:3]] == [item.id for item in first]
    assert max(hit.distance for hit in found) < 0.01
    assert len({hit.item.id for hit in found}) == 6
    gallery.check()


def test_what_is_committed_is_acknowledged_though_the_device_is_lost(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(self: Segment, stored: Stored) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    told: list[str] = []
    with monkeypatch.context() as lost, on_device_loss(told.append):
        lost.setattr(Segment, "add", lose)
        [item] = gallery.add(new(1), features(1))  # it must not be sent again
    assert told == ["CUDA error: an illegal memory access was encountered"]
    gallery.close()
    with closing(Gallery.open(tmp_path, INFO)) as again:
        assert [hit.item.id for hit in again.search(features(1)[0], None, top_k=1).hits] == [
            item.id
        ]


def test_without_memory_for_new_items_the_others_are_searched(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = gallery.add(new(3), features(3))

    def refuse(self: Segment, stored: Stored) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate …")

    add = Segment.add
    monkeypatch.setattr(Segment, "add", refuse)
    [late] = gallery.add(new(1), features(1, seed=1))  # committed: it must not be sent again
    gallery.delete(old[0].id)
    gallery.update(old[1].id, ItemUpdate(person_id="ann"))
    found = gallery.search(features(1, seed=1)[0], None, top_k=10).hits
    assert {hit.item.id: hit.item.person_id for hit in found} == {old[1].id: "ann", old[2].id: None}
    with pytest.raises(MemoryExhausted, match="no memory for more than 2 items"):
        gallery.check()
    monkeypatch.setattr(Segment, "add", add)
    assert gallery.search(features(1, seed=1)[0], None, top_k=1).hits[0].item.id == late.id
    gallery.check()


def test_what_the_host_has_no_room_for_is_not_stored(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.gallery.index.features.CHUNK_ROWS", {"cpu": 4})
    monkeypatch.setattr("service.gallery.index.chunks.CHUNK_ROWS", {"cpu": 4})
    gallery.add(new(3), features(3))
    with monkeypatch.context() as full:
        full.setattr("service.gallery.index.features.host_room", lambda: 0)
        with pytest.raises(GalleryFull, match="to search 2 more items in, so nothing is stored"):
            gallery.add(new(2), features(2, seed=1))
        assert len(gallery) == 3
        [last] = gallery.add(new(1), features(1, seed=1))  # into the chunk that is there
        assert gallery.search(features(1, seed=1)[0], None, top_k=1).hits[0].item.id == last.id
        gallery.check()
    gallery.add(new(2), features(2, seed=2))
    gallery.check()


def test_a_version_opened_while_it_is_built_sees_what_comes_late(tmp_path: Path) -> None:
    gallery = Gallery.open(tmp_path, INFO)
    gallery.add(new(6), features(6))
    gallery.close()
    gallery = Gallery.open(tmp_path, OTHER)
    gallery.add(new(1), features(1, seed=9))  # a higher number than those that come late
    assert gallery.awaiting == 6
    size = OTHER.config.embedding_size
    with closing(Store(tmp_path, OTHER.fingerprint, size)) as store:
        for crops in store.versions.missing(OTHER.fingerprint):
            numbers = [one.number for one in crops]
            rows = features(len(numbers), seed=3).flatten(1).half().numpy()
            store.versions.add_features(OTHER.fingerprint, numbers, rows)
    gallery.check()
    assert len(gallery.search(features(1)[0], None, top_k=100).hits) == 7
    gallery.close()


def spoil(folder: Path, statement: str) -> None:
    """Change the store as no gallery does."""
    with closing(sqlite3.connect(folder / "gallery.sqlite3")) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize(
    ("statement", "left"),
    [
        ("DELETE FROM items WHERE number = 6", 4),
        ("UPDATE items SET id = 'another' WHERE number = 6", 5),
        ("DELETE FROM changes", 5),
        ("UPDATE changes SET moment = moment + 1", 5),
        ("UPDATE models SET created_at = created_at + 1", 5),
    ],
)
def test_a_snapshot_of_another_store_is_not_taken(
    gallery: Gallery,
    tmp_path: Path,
    statement: str,
    left: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    items = gallery.add(new(6), features(6))
    gallery.delete(items[0].id)
    assert gallery.save_index()
    gallery.close()
    Gallery.open(tmp_path, INFO).close()
    assert "does not fit" not in caplog.text
    spoil(tmp_path, statement)
    gallery = Gallery.open(tmp_path, INFO)
    assert "does not fit" in caplog.text
    gallery.check()
    assert gallery.search(features(6)[1], None, top_k=10, exhaustive=True).searched == left
    gallery.close()


def test_rows_that_went_out_of_the_store_are_noticed_after_the_start(
    gallery: Gallery, tmp_path: Path
) -> None:
    gallery.add(new(6), features(6))
    assert gallery.save_index()
    gallery.close()
    spoil(tmp_path, "DELETE FROM items WHERE number = 3")
    gallery = Gallery.open(tmp_path, INFO)
    gallery._follower.maintain()
    with pytest.raises(IndexOutOfStep, match="holds 6 items, the store 5"):
        gallery.check()
    gallery.close()
    gallery = Gallery.open(tmp_path, INFO)
    gallery.check()
    assert gallery.search(features(6)[1], None, top_k=10, exhaustive=True).searched == 5
    gallery.close()
