"""A device that is full: features spill to the host, and nothing else changes for a search."""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from service.gallery.feed import Position, Witness
from service.gallery.index import snapshot
from service.gallery.index.chunks import Chunk
from service.gallery.index.room import NoRoom, capacity, device_room, feature_bytes
from service.gallery.index.shard import SearchRequest, Shard
from service.gallery.records import Filters
from tests.faked_device import FakedDevice
from tests.paths import ROOT
from tests.service.gallery.index.test_shard import CONFIG, DIM, PARTS, features, query, stored

WIDTH = (PARTS + 1) * DIM
ROWS = {"cpu": 64, "cuda": 128}  # of a chunk
CHUNK = feature_bytes(ROWS["cuda"], WIDTH)
COUNT = 1000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of few rows, no reserve, and work that is tried again at once."""
    for module in ("chunks", "features"):
        monkeypatch.setattr(f"service.gallery.index.{module}.CHUNK_ROWS", ROWS)
    monkeypatch.setattr("service.gallery.index.room._DEVICE_SHARE", 0)
    monkeypatch.setattr("service.gallery.index.maintenance._RETRY_SECONDS", 0)
    monkeypatch.setattr("service.gallery.index.maintenance._TOMBSTONE_LEAST", 1)


@contextmanager
def full_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr("service.gallery.index.features.host_room", lambda: 0)
        yield


@contextmanager
def shard_of(device: str, count: int = COUNT) -> Iterator[Shard]:
    shard = Shard(CONFIG, device)
    for start in range(0, count, 100):
        shard.add(stored(features(count)[start : start + 100], start))
    yield shard
    shard.close()


def answers(shard: Shard, filters: Filters | None = None) -> list[list[int]]:
    """What is found in every way, by several queries together."""
    asked = [
        SearchRequest(*query(seed), 40, 80, exhaustive, filters or Filters())
        for seed in range(3)
        for exhaustive in (False, True)
    ]
    return [scored.numbers.tolist() for scored in shard.search(asked)]


def assert_same(shard: Shard, count: int = COUNT, gone: range = range(0)) -> None:
    """The answers are those of a gallery on the CPU, with and without a filter."""
    with shard_of("cpu", count) as plain:
        plain.mark_deleted(list(gone))
        for filters in (Filters(), Filters(camera_id=("c1",))):
            expected = answers(plain, filters)
            assert all(len(found) == 40 for found in expected)
            assert answers(shard, filters) == expected


@pytest.mark.parametrize("chunks", [0, 1, 3, 100])
def test_what_does_not_fit_is_found_on_the_host(faked: FakedDevice, chunks: int) -> None:
    faked.budget = chunks * CHUNK + 1000
    with shard_of("cuda") as shard:
        faked.budget = 1 << 30  # for the search
        told = shard.statistics()
        there = min(COUNT, chunks * ROWS["cuda"])
        assert told.items == COUNT
        assert told.on_host == COUNT - there
        assert told.device_bytes == min(chunks, -(-COUNT // ROWS["cuda"])) * CHUNK
        assert_same(shard)


@pytest.mark.parametrize("spare", [1, 40_000])
def test_a_search_without_memory_on_the_device_is_computed_on_the_host(
    faked: FakedDevice, spare: int
) -> None:
    with shard_of("cuda") as shard:
        told = shard.statistics()
        assert told.on_host == 0
        faked.budget = faked.used + spare
        assert_same(shard)
        assert shard.statistics() == told


def test_room_is_held_for_what_is_being_stored(
    faked: FakedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked.budget = 2 * CHUNK
    with shard_of("cuda", 200) as shard:
        with full_host(monkeypatch):
            with shard.room_for(50), pytest.raises(NoRoom), shard.room_for(7):
                pass
            with pytest.raises(NoRoom, match="neither the GPU nor the host"), shard.room_for(57):
                pass
            assert len(shard) == 200
            with shard.room_for(56):
                shard.add(stored(features(256)[200:], 200))
        faked.budget += 1 << 20
        assert_same(shard, 256)


def test_memory_for_rows_is_taken_before_they_come() -> None:
    """Memory that is only promised would be counted as free when the next rows ask for theirs."""
    chunk = Chunk(0, 896, 1.0, torch.device("cpu"), 8192)
    address, size = chunk.z.data_ptr(), chunk.z.nbytes
    first = address - address % mmap.PAGESIZE
    resident = (ctypes.c_ubyte * math.ceil((address + size - first) / mmap.PAGESIZE))()
    pages = ctypes.c_void_p(first), ctypes.c_size_t(address + size - first)
    assert ctypes.CDLL(None).mincore(*pages, resident) == 0
    assert all(flags & 1 for flags in resident[:-1])  # the last may hold a few bytes only


def test_what_is_on_the_host_moves_up_when_there_is_room(faked: FakedDevice) -> None:
    faked.budget = CHUNK
    with shard_of("cuda", 330) as shard:
        assert shard.statistics().on_host == 330 - 128
        shard.tend()
        shard.wait()
        assert shard.statistics().on_host == 330 - 128
        faked.budget = 4 * CHUNK
        shard.tend()
        shard.wait()
        told = shard.statistics()
        assert told.on_host == 0
        assert told.device_bytes <= 4 * CHUNK
        faked.budget = 1 << 30
        for start in range(330, COUNT, 67):
            end = min(start + 67, COUNT)
            shard.add(stored(features(COUNT)[start:end], start))
        with shard_of("cpu", 330) as plain:
            for start in range(330, COUNT, 67):
                end = min(start + 67, COUNT)
                plain.add(stored(features(COUNT)[start:end], start))
            assert answers(shard) == answers(plain)


def test_compaction_needs_one_chunk_beside_what_is_there(
    faked: FakedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shard_of("cuda") as shard:
        faked.budget = faked.used + CHUNK
        faked.reset()
        monkeypatch.setattr("service.gallery.index.maintenance._room", lambda _: 0)
        with full_host(monkeypatch):
            shard.mark_deleted(list(range(0, COUNT, 2)))
            shard.wait()
        told = shard.statistics()
        assert (told.items, told.tombstones, told.on_host) == (COUNT // 2, 0, 0)
        assert told.rebuilds == 8
        assert faked.most_used <= 9 * CHUNK
        faked.budget = 1 << 30
        with shard_of("cpu") as plain:
            plain.mark_deleted(list(range(0, COUNT, 2)))
            assert answers(shard) == answers(plain)


def test_compaction_waits_for_memory_and_readers_keep_what_they_began_with(
    faked: FakedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shard_of("cuda") as shard:
        before = shard.freeze()
        faked.budget = faked.used
        with full_host(monkeypatch):
            monkeypatch.setattr("service.gallery.index.maintenance._RETRY_SECONDS", 3600)
            shard.mark_deleted(list(range(300)))
            shard.wait()
            assert shard.statistics().tombstones == 300
        shard._maintenance._retry_at = 0  # an hour later
        faked.budget = 1 << 30
        shard.tend()
        shard.wait()
        assert shard.statistics().tombstones == 0
        assert_same(shard, gone=range(300))
        kept = before.segment.features.stored(np.arange(COUNT))
        assert (kept == stored(features(COUNT)).features).all()


def test_chunks_without_a_living_row_are_freed_where_no_memory_is_left(
    faked: FakedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.gallery.index.maintenance._RETRY_SECONDS", 3600)
    with shard_of("cuda") as shard:
        faked.budget = faked.used
        with full_host(monkeypatch):
            shard.mark_deleted([*range(60), *range(256, 512)])
            shard.wait()
        told = shard.statistics()
        assert (told.items, told.tombstones, told.device_bytes) == (COUNT - 316, 60, 6 * CHUNK)
        faked.budget = 1 << 30
        with shard_of("cpu") as plain:
            plain.mark_deleted([*range(60), *range(256, 512)])
            assert answers(shard) == answers(plain)


def test_what_comes_during_a_compaction_is_kept(
    faked: FakedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = [stored(features(COUNT)[start : start + 40], start) for start in range(600, COUNT, 40)]
    with shard_of("cuda", 600) as shard:
        monkeypatch.setattr("service.gallery.index.maintenance._room", lambda _: 0)
        shard.mark_deleted(list(range(0, 300)))
        for block in late:
            shard.add(block)
        shard.mark_deleted(list(range(300, 310)))
        shard.wait()
        with shard_of("cpu", 600) as plain:
            for block in late:
                plain.add(block)
            plain.mark_deleted(list(range(310)))
            assert answers(shard) == answers(plain)


def test_searches_beside_upkeep_miss_nothing(
    faked: FakedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked.budget = 3 * CHUNK
    gone = range(0, COUNT, 3)
    with shard_of("cuda") as shard, shard_of("cpu") as plain, ThreadPoolExecutor(2) as threads:
        plain.mark_deleted(list(gone))
        expected = answers(plain)
        monkeypatch.setattr("service.gallery.index.maintenance._room", lambda _: 0)
        shard.mark_deleted(list(gone))
        faked.budget = 1 << 30
        done = threading.Event()

        def look() -> int:
            times = 0
            while not done.is_set() or not times:
                assert answers(shard) == expected
                times += 1
            return times

        looking = [threads.submit(look) for _ in range(2)]
        try:
            for _ in range(3):  # what is on the host moves up after the compaction
                shard.tend()
                shard.wait()
        finally:
            done.set()
        assert all(job.result() for job in looking)
        told = shard.statistics()
        assert (told.tombstones, told.on_host) == (0, 0)


def test_a_snapshot_larger_than_the_device_opens(faked: FakedDevice, tmp_path: Path) -> None:
    with shard_of("cuda") as shard:
        snapshot.save(
            shard.freeze(),
            tmp_path / "index",
            fingerprint="a" * 64,
            position=Position(1, 2),
            witness=Witness("a", 1, 2),
        )
    del shard
    assert faked.used == 0
    faked.budget = 3 * CHUNK
    restored = snapshot.load(tmp_path / "index", CONFIG, "cuda", fingerprint="a" * 64)
    again = Shard(CONFIG, "cuda")
    try:
        again.restore(restored.segment)
        assert again.statistics().on_host == COUNT - 3 * ROWS["cuda"]
        faked.budget = 1 << 30
        assert_same(again)
    finally:
        again.close()


def test_the_capacity_is_what_a_shard_takes(faked: FakedDevice) -> None:
    faked.budget = 5 * CHUNK
    assert device_room(torch.device("cuda")) == 5 * CHUNK
    there = capacity(WIDTH, "cuda")
    assert there.on_device == 5 * ROWS["cuda"]
    assert there.on_host > 10_000
    with shard_of("cuda") as shard:
        told = shard.statistics()
        assert told.items - told.on_host == there.on_device
    assert capacity(WIDTH, "cpu").on_device is None


def test_the_documents_say_how_much_fits(
    faked: FakedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    rows = re.findall(r"^\| (\d+) GiB \| ([\d,]+) \|$", (ROOT / "docs/deploy.md").read_text(), re.M)
    assert len(rows) == 4
    for memory, items in rows:
        faked.budget = int(memory) << 30
        assert capacity(7 * 128, "cuda").on_device == int(items.replace(",", ""))
