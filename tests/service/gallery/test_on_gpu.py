"""A gallery on a GPU answers as one on the CPU does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model import CheckpointInfo, CMTConfig, Modulation
from service.gallery import Filters, Gallery, NewItem
from tests.service.stores import crop

INFO = CheckpointInfo("a" * 64, CMTConfig(input_height=96, input_width=48, dim=16, heads=2))
SHAPE = (INFO.config.parts, INFO.config.dim)
COUNT = 400

pytestmark = pytest.mark.gpu


def sampled(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def both(device: str, tmp_path: Path) -> Iterator[tuple[Gallery, Gallery]]:
    """The same items on the CPU and on the GPU."""
    opened = [
        Gallery.open(tmp_path / name, INFO, device=place, candidates=60)
        for name, place in (("here", "cpu"), ("there", device))
    ]
    items = [NewItem(crop(n), f"person {n % 40}", f"camera {n % 3}") for n in range(COUNT)]
    for gallery in opened:
        gallery.add(items, sampled(1, COUNT, *SHAPE))
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
