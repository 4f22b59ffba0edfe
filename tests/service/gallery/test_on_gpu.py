"""A gallery on a GPU answers as one on the CPU does, also where the GPU's memory is full."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import CheckpointInfo, CMTConfig, Modulation
from service.errors import GalleryFull, MemoryExhausted
from service.gallery import Filters, Gallery, NewItem
from service.gallery.index.room import feature_bytes
from tests.faked_device import FakedDevice
from tests.service.stores import crop

INFO = CheckpointInfo("a" * 64, CMTConfig(input_height=96, input_width=48, dim=16, heads=2))
SHAPE = (INFO.config.parts, INFO.config.dim)
COUNT = 400

pytestmark = pytest.mark.gpu


def sampled(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["all", "half"])
def both(
    request: pytest.FixtureRequest,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[Gallery, Gallery]]:
    """The same items on the CPU and on the GPU, all there or half of them for lack of memory."""
    if request.param == "half":
        rows = {"cpu": 32, "cuda": COUNT // 4}
        for module in ("chunks", "features"):
            monkeypatch.setattr(f"service.gallery.index.{module}.CHUNK_ROWS", rows)
        chunks = iter([1 << 30, 1 << 30])
        monkeypatch.setattr("service.gallery.index.features.device_room", lambda _: next(chunks, 0))
    opened = [
        Gallery.open(tmp_path / name, INFO, device=place, candidates=60)
        for name, place in (("here", "cpu"), ("there", device))
    ]
    items = [NewItem(crop(n), f"person {n % 40}", f"camera {n % 3}") for n in range(COUNT)]
    for gallery in opened:
        gallery.add(items, sampled(1, COUNT, *SHAPE))
    there = opened[1].spilled
    assert there == (COUNT // 2 if request.param == "half" else 0)
    yield opened[0], opened[1]
    for gallery in opened:
        gallery.close()


def hits(gallery: Gallery, seed: int, **options: Any) -> list[tuple[str, float]]:
    """What a query finds, by what all galleries share: the picture."""
    gamma, beta = 1 + 0.3 * sampled(seed + 1, 1, SHAPE[1]), 0.3 * sampled(seed + 2, 1, SHAPE[1])
    query = sampled(seed, *SHAPE)
    found = gallery.search(query, Modulation(gamma, beta), top_k=30, **options).hits
    return [(hit.item.sha256, hit.distance) for hit in found]


def assert_same(both: tuple[Gallery, Gallery], **options: Any) -> list[tuple[str, float]]:
    there: list[tuple[str, float]] = []
    for seed in (10, 20, 30):
        here, there = (hits(gallery, seed, **options) for gallery in both)
        assert here
        assert [picture for picture, _ in there] == [picture for picture, _ in here]
        distances = [distance for _, distance in here]
        assert [distance for _, distance in there] == pytest.approx(distances, abs=1e-5)
    return there


@pytest.mark.parametrize("exhaustive", [False, True])
def test_the_answers_are_the_same(both: tuple[Gallery, Gallery], exhaustive: bool) -> None:
    assert len(assert_same(both, exhaustive=exhaustive)) == 30


@pytest.mark.parametrize("exhaustive", [False, True])
def test_a_filter_that_leaves_few_finds_all_of_them(
    both: tuple[Gallery, Gallery], exhaustive: bool
) -> None:
    people = Filters(person_id=("person 3", "person 5"))
    found = assert_same(both, exhaustive=exhaustive, filters=people)
    assert len(found) == COUNT // 40 * 2


def test_what_is_deleted_is_never_found_and_what_is_added_is(
    both: tuple[Gallery, Gallery],
) -> None:
    for gallery in both:
        assert gallery.delete_where("person 3") == COUNT // 40
        gallery.add([NewItem(crop(COUNT), "late")], sampled(10, 1, *SHAPE))
    found = assert_same(both, filters=Filters(person_id=("person 3", "late")))
    assert [picture for picture, _ in found] == [f"{COUNT:064x}"]


def test_a_gallery_is_opened_on_the_gpu_from_what_a_cpu_wrote(device: str, tmp_path: Path) -> None:
    with_items = Gallery.open(tmp_path, INFO, device="cpu")
    with_items.add([NewItem(crop(n)) for n in range(50)], sampled(1, 50, *SHAPE))
    before = hits(with_items, 10)
    with_items.close()
    again = Gallery.open(tmp_path, INFO, device=device)
    try:
        after = hits(again, 10)
    finally:
        again.close()
    assert [picture for picture, _ in after] == [picture for picture, _ in before]


@pytest.fixture
def full(faked: FakedDevice, monkeypatch: pytest.MonkeyPatch) -> FakedDevice:
    """A device that has just room for 2 chunks of 64 items, beside a host without any."""
    rows = {"cpu": 32, "cuda": 64}
    for module in ("chunks", "features"):
        monkeypatch.setattr(f"service.gallery.index.{module}.CHUNK_ROWS", rows)
    monkeypatch.setattr("service.gallery.index.room._DEVICE_SHARE", 0)
    monkeypatch.setattr("service.gallery.index.features.host_room", lambda: 0)
    width = (INFO.config.parts + 1) * INFO.config.dim
    faked.budget = 2 * feature_bytes(rows["cuda"], width)
    return faked


def add(gallery: Gallery, start: int, end: int) -> None:
    items = [NewItem(crop(n), f"person {n % 40}") for n in range(start, end)]
    gallery.add(items, sampled(1, 200, *SHAPE)[start:end])


def test_where_nothing_fits_nothing_is_stored_and_reads_go_on(
    full: FakedDevice, tmp_path: Path
) -> None:
    gallery = Gallery.open(tmp_path, INFO, device="cuda")
    try:
        add(gallery, 0, 100)
        found = hits(gallery, 10)
        with pytest.raises(
            GalleryFull, match=r"no memory to search 29 more items in.*delete items"
        ):
            add(gallery, 100, 129)
        assert len(gallery) == 100
        gallery.check()
        assert hits(gallery, 10) == found
        add(gallery, 100, 128)
        gallery.check()
        with pytest.raises(GalleryFull, match="1 more item in"):
            add(gallery, 128, 129)
    finally:
        gallery.close()
    del gallery
    again = Gallery.open(tmp_path, INFO, device="cuda")
    try:
        again.check()
        assert again.statistics.items == len(again) == 128
        again.delete_where("person 3")
        full.budget *= 2
        add(again, 128, 129)
        assert len(hits(again, 10)) == 30
    finally:
        again.close()


def test_a_gallery_larger_than_the_device_opens_from_sql_and_from_a_snapshot(
    full: FakedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.gallery.index.features.host_room", lambda: 1 << 30)
    gallery = Gallery.open(tmp_path, INFO, device="cuda")
    add(gallery, 0, 200)
    expected = hits(gallery, 10)
    assert gallery.statistics.on_host == 200 - 128
    gallery.save_index()
    gallery.close()
    del gallery
    for snapshot in (True, False):
        if not snapshot:
            shutil.rmtree(tmp_path / "index")
        again = Gallery.open(tmp_path, INFO, device="cuda")
        try:
            again.check()
            assert again.statistics.on_host == 200 - 128
            assert hits(again, 10) == expected
        finally:
            again.close()
        del again


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_gallery_larger_than_all_memory_opens_with_what_fits(
    full: FakedDevice, tmp_path: Path, snapshot: bool
) -> None:
    full.budget *= 2
    gallery = Gallery.open(tmp_path, INFO, device="cuda")
    for start in range(0, 200, 50):
        add(gallery, start, start + 50)
    if snapshot:
        assert gallery.save_index()
    gallery.close()
    del gallery
    full.budget //= 4
    gallery = Gallery.open(tmp_path, INFO, device="cuda")
    try:
        with pytest.raises(MemoryExhausted, match="more are stored, which no query finds"):
            gallery.check()
        with pytest.raises(GalleryFull):
            add(gallery, 0, 1)
        full.budget = 1 << 30
        gallery.check()
        assert len(hits(gallery, 10)) == 30
    finally:
        gallery.close()
