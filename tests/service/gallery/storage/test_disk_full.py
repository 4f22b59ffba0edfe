"""A disk that is really full: a small tmpfs, filled to the last byte while the gallery is open."""

from __future__ import annotations

import io
import itertools
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from model import CheckpointInfo, CMTConfig
from service.errors import ItemNotFound, ServiceError, StorageFull, StorageUnwritable
from service.gallery import Filters, Gallery, NewItem
from service.images.decode import decode

INFO = CheckpointInfo("a" * 64, CMTConfig(parts=2, dim=16, heads=2))
SIZE = "4m"


def features(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, INFO.config.parts, INFO.config.dim, generator=generator)


def new_items(count: int) -> list[NewItem]:
    """Noise: 6 kB each that nothing can compress."""
    buffer = io.BytesIO()
    noise = random.Random(1).randbytes(32 * 64 * 3)
    Image.frombytes("RGB", (32, 64), noise).save(buffer, "PNG")
    return [NewItem(decode(buffer.getvalue()))] * count


class Disk:
    """A tmpfs; `fill` takes all that is left, `free` gives it back."""

    def __init__(self, root: Path) -> None:
        self.data = root / "data"
        self._ballast = root / "ballast"

    def fill(self) -> None:
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield Disk(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def enroll(gallery: Gallery, count: int, seed: int) -> dict[str, Tensor]:
    """So many items in one call → id → features."""
    y = features(count, seed)
    items = gallery.add(new_items(count), y)
    return {item.id: row for item, row in zip(items, y, strict=True)}


def enroll_until_full(gallery: Gallery, seed: int) -> dict[str, Tensor]:
    """Items until StorageFull → id → features of those acknowledged."""
    stored: dict[str, Tensor] = {}

    def enroll_on() -> None:
        for number in itertools.count(seed):
            stored.update(enroll(gallery, 5, number))

    with pytest.raises(StorageFull, match="free some") as caught:
        enroll_on()
    assert (caught.value.status, caught.value.code) == (507, "storage_full")
    return stored


def assert_holds(gallery: Gallery, stored: dict[str, Tensor]) -> None:
    """List and search know exactly these items."""
    assert {item.id for item in gallery.list(Filters(), 10**5).items} == stored.keys()
    assert len(gallery) == len(stored)
    for item_id, x in list(stored.items())[::7]:
        for exhaustive in (False, True):
            hits = gallery.search(x, None, top_k=1, exhaustive=exhaustive).hits
            assert [hit.item.id for hit in hits] == [item_id]


def test_enrollment_is_refused_while_full_and_works_again_without_reopening(disk: Disk) -> None:
    gallery = Gallery.open(disk.data, INFO)
    stored = enroll(gallery, 20, seed=10**6)
    disk.fill()
    stored |= enroll_until_full(gallery, seed=0)
    assert_holds(gallery, stored)
    assert gallery.image(next(iter(stored)))[0] == new_items(1)[0].crop.data
    with pytest.raises(StorageUnwritable, match="free space"):
        gallery.check()

    disk.free()
    stored |= enroll(gallery, 20, seed=2 * 10**6)
    gallery.check()
    assert_holds(gallery, stored)
    gallery.close()
    again = Gallery.open(disk.data, INFO)
    assert_holds(again, stored)
    again.close()


def test_concurrent_enrollments_are_each_stored_or_refused(disk: Disk) -> None:
    gallery = Gallery.open(disk.data, INFO)
    results: list[dict[str, Tensor]] = []

    def fill_up(seed: int) -> None:
        results.append(enroll_until_full(gallery, seed))

    threads = [threading.Thread(target=fill_up, args=(seed,)) for seed in (0, 10**6, 2 * 10**6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(threads)
    assert all(results)
    stored = {item_id: x for result in results for item_id, x in result.items()}
    assert_holds(gallery, stored)
    gallery.close()


def test_a_deletion_on_a_full_disk_happens_wholly_or_not_at_all(disk: Disk) -> None:
    gallery = Gallery.open(disk.data, INFO)
    stored = enroll(gallery, 40, seed=10**6)
    ids = list(stored)
    disk.fill()
    stored |= enroll_until_full(gallery, seed=0)
    for item_id in ids[:20]:
        try:
            gallery.delete(item_id)
        except StorageFull:
            continue
        del stored[item_id]
        with pytest.raises(ItemNotFound):
            gallery.get(item_id)
    assert_holds(gallery, stored)

    disk.free()
    for item_id in stored.keys() & set(ids):
        gallery.delete(item_id)
        del stored[item_id]
    gallery.check()
    assert_holds(gallery, stored)
    gallery.close()


def test_closing_and_opening_on_a_full_disk_lose_nothing(disk: Disk) -> None:
    """Whatever is saved at the end finds no space; an opening works or says why it cannot."""
    gallery = Gallery.open(disk.data, INFO)
    stored = enroll(gallery, 100, seed=10**6)
    disk.fill()
    stored |= enroll_until_full(gallery, seed=0)
    gallery.close()
    disk.fill()  # what closing gave back
    refusal: str | None = None
    try:
        gallery = Gallery.open(disk.data, INFO)
    except ServiceError as error:
        refusal = error.detail
    else:
        assert_holds(gallery, stored)
        gallery.close()
    assert refusal is None or "free some" in refusal or "check the disk" in refusal
    disk.free()
    gallery = Gallery.open(disk.data, INFO)
    gallery.check()
    assert_holds(gallery, stored)
    gallery.close()
