"""Stores on both databases, and small things to put into them."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from service.gallery.records import NewItem
from service.gallery.storage.store import Store
from service.gallery.storage.streaming import View
from service.images.decode import Crop

SIZE = 12
MODEL, OTHER = "a" * 64, "b" * 64


class OpenStore(Protocol):
    """Opens the test's database once more → a store, closed after the test at the latest."""

    def __call__(self, model: str = MODEL) -> Store: ...


def crop(seed: int = 0) -> Crop:
    """A picture that no other seed gives; the store looks at none of its bytes."""
    picture = Image.frombytes("L", (16, 32), random.Random(seed).randbytes(16 * 32))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=0)
    return Crop(
        image=Image.new("RGB", (16, 32)),
        data=buffer.getvalue(),
        media_type="image/png",
        modality="ir",
        modality_source="given",
        width=16,
        height=32,
        bit_depth=8,
        sha256=f"{seed:064x}",
    )


def new(count: int, **fields: Any) -> list[NewItem]:
    return [replace(NewItem(crop(i)), **fields) for i in range(count)]


def rows(count: int, seed: int = 0, size: int = SIZE) -> npt.NDArray[np.float16]:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float16)


def all_of(view: View | Store, **options: Any) -> dict[int, tuple[Any, ...]]:
    """Everything that is streamed: row number → labels and features."""
    found: dict[int, tuple[Any, ...]] = {}
    for block in view.stream(**options):
        assert block.features.dtype == np.float16
        labels = zip(block.persons, block.cameras, block.modalities, block.captured, strict=True)
        for number, label, row in zip(block.numbers, labels, block.features, strict=True):
            assert number not in found
            found[number] = (*label, row.tolist())
    assert list(found) == sorted(found)
    return found


@pytest.fixture(params=["sqlite", "postgresql"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """On SQLite, then on PostgreSQL."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else None
    opened: list[Store] = []

    def open_one(model: str = MODEL) -> Store:
        opened.append(Store(tmp_path, model, SIZE, url))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: OpenStore) -> Store:
    return open_store()
