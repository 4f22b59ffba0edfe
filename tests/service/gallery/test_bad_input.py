"""What a caller of the engine may get wrong: an error at once, and nothing changed."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from model import CheckpointInfo, CMTConfig, Modulation
from service.errors import (
    CursorInvalid,
    GalleryLocked,
    IdempotencyConflict,
    ItemNotFound,
    ServiceError,
    StorageUnwritable,
)
from service.gallery import Filters, Gallery, NewItem, RequestKey
from service.images.decode import decode

PARTS, DIM = 2, 16
INFO = CheckpointInfo("a" * 64, CMTConfig(parts=PARTS, dim=DIM, heads=2))
NAN, INF = float("nan"), float("inf")


def features(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, PARTS, DIM, generator=torch.Generator().manual_seed(seed))


def new_item(**fields: Any) -> NewItem:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 32)).save(buffer, "PNG")
    return NewItem(decode(buffer.getvalue()), **fields)


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    """Two items."""
    opened = Gallery.open(tmp_path, INFO)
    opened.add([new_item(person_id="ann"), new_item()], features(2))
    yield opened
    opened.close()


def assert_unchanged(gallery: Gallery, folder: Path) -> None:
    """The two items, found by searches, before and after a restart."""
    for reopened in (False, True):
        if reopened:
            gallery.close()
            gallery = Gallery.open(folder, INFO)
        ids = [item.id for item in gallery.list(Filters(), 10).items]
        assert len(ids) == len(gallery) == 2
        hits = [gallery.search(x, None, top_k=1).hits[0] for x in features(2)]
        assert [hit.item.id for hit in hits] == ids
        gallery.check()
    gallery.close()


@pytest.mark.parametrize(
    "shape",
    [
        (1, PARTS, DIM // 2),
        (1, PARTS + 1, DIM),
        (1, DIM, PARTS),
        (1, PARTS * DIM),
    ],
)
def test_features_of_another_shape_are_refused(
    gallery: Gallery, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="shape"):
        gallery.add([new_item()], torch.ones(shape))
    assert_unchanged(gallery, tmp_path)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 65_520.0])
def test_features_without_a_finite_fp16_value_are_refused(
    gallery: Gallery, tmp_path: Path, value: float
) -> None:
    y = features(2)
    y[1, 1, 3] = value
    with pytest.raises(ValueError, match="finite"):
        gallery.add([new_item(), new_item()], y)
    assert_unchanged(gallery, tmp_path)


@pytest.mark.parametrize("exhaustive", [False, True])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"x": torch.ones(PARTS, DIM // 2)}, "shape"),
        ({"x": torch.ones(PARTS + 1, DIM)}, "shape"),
        ({"x": torch.ones(1, PARTS, DIM)}, "shape"),
        ({"x": torch.full((PARTS, DIM), NAN)}, "not finite"),
        ({"modulation": Modulation(torch.ones(1, 3), torch.ones(1, 3))}, "shapes"),
        ({"modulation": Modulation(torch.full((1, DIM), INF), torch.ones(1, DIM))}, "not finite"),
        ({"top_k": 0}, "at least 1"),
        ({"top_k": -1}, "at least 1"),
        ({"group_by": "camera_id"}, "grouped by person_id"),
    ],
    ids=["D", "P", "batch", "NaN", "short γ", "infinite γ", "top_k 0", "top_k −1", "group_by"],
)
def test_searches_that_mean_nothing_are_refused(
    gallery: Gallery, arguments: dict[str, Any], sentence: str, exhaustive: bool
) -> None:
    usual = {"x": features(1)[0], "modulation": None, "top_k": 1}
    with pytest.raises(ValueError, match=sentence):
        gallery.search(**{**usual, **arguments}, exhaustive=exhaustive)


@pytest.mark.parametrize(
    "item_id",
    ["", "x", "a" * 10**6, "\0", "' OR 1=1 --", "%", "00000000-0000-7000-8000-000000000000"],
)
def test_unknown_ids_are_a_short_sentence(gallery: Gallery, tmp_path: Path, item_id: str) -> None:
    for call in (gallery.get, gallery.image, gallery.delete):
        with pytest.raises(ItemNotFound, match="no item has the id") as caught:
            call(item_id)
        assert len(caught.value.detail) < 200
    assert gallery.delete_where(item_id) == 0
    assert_unchanged(gallery, tmp_path)


def test_another_gallerys_cursor_is_refused(gallery: Gallery) -> None:
    for cursor in ("", "AAAA", "YWZ0ZXI6MS41"):
        with pytest.raises(CursorInvalid, match="start again without"):
            gallery.list(Filters(), 10, cursor)


def test_a_request_key_enrolls_once(gallery: Gallery) -> None:
    """Twice in one call, or again later: refused as a whole, and the key stays usable."""
    request = RequestKey("key", "0" * 64)
    twice = [new_item(request=request), new_item(request=request)]
    with pytest.raises(IdempotencyConflict):
        gallery.add(twice, features(2, seed=1))
    assert (len(gallery), gallery.list(Filters(), 10).total) == (2, 2)
    (item,) = gallery.add(twice[:1], features(1, seed=1))
    with pytest.raises(IdempotencyConflict):
        gallery.add([new_item(), twice[1]], features(2, seed=2))
    assert (len(gallery), gallery.list(Filters(), 10).total) == (3, 3)
    assert gallery.enrolled_by(request) == item
    with pytest.raises(IdempotencyConflict, match="new key"):
        gallery.enrolled_by(request._replace(sha256="1" * 64))
    gallery.check()


def test_metadata_that_is_no_json_changes_nothing(gallery: Gallery, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        gallery.add([new_item(), new_item(metadata={"a": object()})], features(2, seed=1))
    assert_unchanged(gallery, tmp_path)


# --- the data folder and the database ---


def test_a_read_only_folder_is_a_sentence(gallery: Gallery, tmp_path: Path) -> None:
    gallery.close()
    folder = str(tmp_path)
    if subprocess.run(["mount", "--bind", folder, folder], check=False).returncode:
        pytest.skip("only root may mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        with pytest.raises(StorageUnwritable, match="check its path, owner and mount"):
            Gallery.open(tmp_path, INFO)
    finally:
        subprocess.run(["umount", folder], check=True)
    assert_unchanged(Gallery.open(tmp_path, INFO), tmp_path)


@pytest.mark.parametrize("name", ["lock", "gallery.sqlite3"])
def test_a_folder_in_a_files_way_is_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ServiceError):
        Gallery.open(tmp_path, INFO)
    (tmp_path / name).rmdir()
    Gallery.open(tmp_path, INFO).close()  # the lock was given free


@pytest.mark.parametrize("url", ["nonsense", "postgresql+nodriver://host/db", "mysql://host/db"])
def test_a_wrong_database_url_is_a_sentence(tmp_path: Path, url: str) -> None:
    with pytest.raises(ServiceError):
        Gallery.open(tmp_path, INFO, database_url=url)


def test_one_sqlite_file_is_not_opened_from_two_folders(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    first = Gallery.open(tmp_path / "a", INFO, database_url=url)
    try:
        with pytest.raises(GalleryLocked):
            Gallery.open(tmp_path / "b", INFO, database_url=url).close()
    finally:
        first.close()


def test_a_deletion_through_a_sqlite_url_erases(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'other.sqlite3'}"
    gallery = Gallery.open(tmp_path / "data", INFO, database_url=url)
    try:
        item = new_item()
        (added,) = gallery.add([item], features(1))
        gallery.delete(added.id)
        gallery.check()
        assert item.crop.data[-40:] not in (tmp_path / "other.sqlite3").read_bytes()
    finally:
        gallery.close()


def test_a_closed_gallery_neither_reads_nor_writes(gallery: Gallery) -> None:
    gallery.close()
    gallery.close()  # a second time does nothing
    for call in (
        lambda: gallery.add([new_item()], features(1, seed=1)),
        lambda: gallery.search(features(1)[0], None, top_k=1),
        lambda: gallery.list(Filters(), 1),
    ):
        with pytest.raises((ServiceError, ValueError)):
            call()
