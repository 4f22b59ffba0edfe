"""A gallery goes from one checkpoint to the next: searched all the while, never with both."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from model import CheckpointInfo, CMTConfig
from service.errors import GalleryDamaged, ModelVersionConflict, ModelVersionUnknown
from service.gallery import Filters, Gallery, ItemUpdate, NewItem, Progress, ReembeddingStopped
from service.gallery.follower import Follower
from service.images.decode import Crop, decode

OLD = CheckpointInfo("a" * 64, CMTConfig(parts=2, dim=16, heads=2))
NEXT = CheckpointInfo("b" * 64, CMTConfig(parts=3, dim=16, heads=2, input_height=96))


def new_item(shade: int, **fields: Any) -> NewItem:
    buffer = io.BytesIO()
    image = Image.new("RGB", (16, 32), (shade, 255 - shade, shade // 2))
    image.paste(Image.linear_gradient("L").resize((16, 16)), (0, 16))  # not empty
    image.save(buffer, "PNG")
    return NewItem(decode(buffer.getvalue(), modality="rgb"), **fields)


def embedder(info: CheckpointInfo) -> Callable[[Sequence[Crop]], Tensor]:
    """Features that the shade decides, other ones for each checkpoint."""

    def embed(crops: Sequence[Crop]) -> Tensor:
        rows = []
        for crop in crops:
            red = crop.image.tobytes()[0]
            seed = int(info.fingerprint[:4], 16) + red
            generator = torch.Generator().manual_seed(seed)
            rows.append(torch.randn(info.config.parts, info.config.dim, generator=generator))
        return torch.stack(rows)

    return embed


def enroll(gallery: Gallery, shade: int, info: CheckpointInfo = OLD, **fields: Any) -> str:
    item = new_item(shade, **fields)
    return gallery.add([item], embedder(info)([item.crop]), model=info.fingerprint)[0].id


def nearest(gallery: Gallery, shade: int, info: CheckpointInfo) -> str:
    x = embedder(info)([new_item(shade).crop])[0]
    (hit,) = gallery.search(x, None, top_k=1, model=info.fingerprint).hits
    assert hit.distance < 0.01
    return hit.item.id


@pytest.fixture(params=["sqlite", "postgresql"])
def gallery(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gallery]:
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else None
    opened = Gallery.open(tmp_path, OLD, database_url=url)
    yield opened
    opened.close()


def test_every_item_is_found_by_the_next_checkpoint_after_the_switch(gallery: Gallery) -> None:
    ids = {shade: enroll(gallery, shade) for shade in range(0, 200, 2)}
    gallery.delete(ids.pop(0))
    seen: list[Progress] = []
    gallery.reembed(NEXT, embedder(NEXT), progress=seen.append)
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, 99, 99)
    assert gallery.model == NEXT.fingerprint
    assert (gallery.awaiting, len(gallery)) == (0, 99)
    for shade, item_id in ids.items():
        assert nearest(gallery, shade, NEXT) == item_id
        assert gallery.get(item_id).model == NEXT.fingerprint
    states = {
        version.fingerprint: (version.state, version.embedded) for version in gallery.versions
    }
    assert states == {OLD.fingerprint: ("retired", 99), NEXT.fingerprint: ("active", 99)}
    gallery.check()


def test_a_crop_is_turned_to_the_same_polarity_again(gallery: Gallery) -> None:
    data = new_item(60).crop.data
    dark, light = (decode(data, modality="ir", polarity=p) for p in ("black_hot", "white_hot"))
    assert dark.image.tobytes()[0] != light.image.tobytes()[0]
    [item] = gallery.add([NewItem(dark)], embedder(OLD)([dark]))
    gallery.reembed(NEXT, embedder(NEXT))
    assert gallery.get(item.id).polarity == "black_hot"
    for crop, near in ((dark, True), (light, False)):
        [hit] = gallery.search(embedder(NEXT)([crop])[0], None, top_k=1).hits
        assert (hit.distance < 0.01) == near


def test_features_of_two_checkpoints_never_meet(gallery: Gallery) -> None:
    enroll(gallery, 1)
    x = embedder(OLD)([new_item(1).crop])
    gallery.reembed(NEXT, embedder(NEXT))
    with pytest.raises(ModelVersionConflict, match="embed the image again"):
        gallery.search(x[0], None, top_k=1, model=OLD.fingerprint)
    with pytest.raises(ModelVersionConflict, match="embed the image again"):
        enroll(gallery, 2, OLD)
    with pytest.raises(ValueError, match="shape"):
        gallery.search(x[0], None, top_k=1)
    assert len(gallery) == 1


def test_a_stopped_one_goes_on_and_the_old_version_serves_meanwhile(gallery: Gallery) -> None:
    ids = {shade: enroll(gallery, shade) for shade in range(200)}
    stop, embedded = threading.Event(), []

    def embed_some(crops: Sequence[Crop]) -> Tensor:
        embedded.append(len(crops))
        if len(embedded) == 2:
            stop.set()
        return embedder(NEXT)(crops)

    def embed_rest(crops: Sequence[Crop]) -> Tensor:
        embedded.append(len(crops))
        return embedder(NEXT)(crops)

    with pytest.raises(ReembeddingStopped):
        gallery.reembed(NEXT, embed_some, stop=stop)
    first = sum(embedded)
    assert 0 < first < 200
    assert gallery.model == OLD.fingerprint
    assert nearest(gallery, 7, OLD) == ids[7]
    embedded.clear()
    gallery.reembed(NEXT, embed_rest)
    assert sum(embedded) <= 200 - first + 32  # those of the check come twice
    assert nearest(gallery, 7, NEXT) == ids[7]


def test_what_comes_and_goes_meanwhile_is_right_after_the_switch(gallery: Gallery) -> None:
    ids = {shade: enroll(gallery, shade) for shade in range(100)}
    begun = threading.Event()

    def embed_slowly(crops: Sequence[Crop]) -> Tensor:
        begun.set()
        return embedder(NEXT)(crops)

    worker = threading.Thread(target=gallery.reembed, args=(NEXT, embed_slowly))
    worker.start()
    begun.wait(60)
    shade = 100
    while worker.is_alive() and shade < 250:
        try:
            ids[shade] = enroll(gallery, shade)
        except ModelVersionConflict:
            ids[shade] = enroll(gallery, shade, NEXT)
        shade += 1
        if shade % 5 == 0:
            gallery.delete(ids.pop(shade - 100))
    worker.join(60)
    assert not worker.is_alive()
    listed = {item.id for item in gallery.list(Filters(), 1000).items}
    assert listed == set(ids.values())
    for shade, item_id in ids.items():
        assert nearest(gallery, shade, NEXT) == item_id
    gallery.check()


def test_a_wrong_second_look_keeps_the_old_version(gallery: Gallery) -> None:
    item_id = enroll(gallery, 1)
    looks: list[int] = []

    def embed_at_random(crops: Sequence[Crop]) -> Tensor:
        looks.append(len(crops))
        return torch.randn(len(crops), 3, 16, generator=torch.Generator().manual_seed(len(looks)))

    with pytest.raises(GalleryDamaged, match="old version stays"):
        gallery.reembed(NEXT, embed_at_random)
    assert gallery.model == OLD.fingerprint
    assert nearest(gallery, 1, OLD) == item_id


def test_an_empty_gallery_changes_its_checkpoint(gallery: Gallery) -> None:
    gallery.reembed(NEXT, embedder(NEXT))
    item_id = enroll(gallery, 1, NEXT)
    assert nearest(gallery, 1, NEXT) == item_id


def test_a_version_is_dropped_unless_it_is_in_use(gallery: Gallery) -> None:
    enroll(gallery, 1)
    gallery.reembed(NEXT, embedder(NEXT))
    with pytest.raises(ModelVersionConflict, match="in use"):
        gallery.drop_version(NEXT.fingerprint)
    with pytest.raises(ModelVersionUnknown):
        gallery.drop_version("c" * 64)
    gallery.drop_version(OLD.fingerprint)
    assert [version.fingerprint for version in gallery.versions] == [NEXT.fingerprint]
    assert len(gallery) == 1


def test_a_second_one_at_the_same_time_is_refused(gallery: Gallery) -> None:
    enroll(gallery, 1)
    refused: list[str] = []

    def embed(crops: Sequence[Crop]) -> Tensor:
        try:
            gallery.reembed(NEXT, embedder(NEXT))
        except ModelVersionConflict as error:
            refused.append(error.detail)
        return embedder(NEXT)(crops)

    gallery.reembed(NEXT, embed)
    assert refused
    assert "already" in refused[0]
    assert gallery.model == NEXT.fingerprint


def test_new_labels_are_what_filters_see(gallery: Gallery) -> None:
    item_id = enroll(gallery, 1, person_id="old", camera_id="north")
    changed = gallery.update(item_id, ItemUpdate(person_id="new"))
    assert (changed.person_id, changed.camera_id) == ("new", "north")
    x = embedder(OLD)([new_item(1).crop])[0]

    def found(**filters: Any) -> int:
        return gallery.search(x, None, top_k=5, filters=Filters(**filters)).searched

    assert found(person_id=("old",)) == 0
    assert found(person_id=("new",), camera_id=("north",)) == 1
    gallery.update(item_id, ItemUpdate(camera_id=None))
    assert found(camera_id=("north",)) == 0


def test_processes_on_one_database_see_each_others_changes(
    postgres_url: str, tmp_path: Path
) -> None:
    one = Gallery.open(tmp_path / "one", OLD, database_url=postgres_url)
    two = Gallery.open(tmp_path / "two", OLD, database_url=postgres_url)
    try:
        first, second = enroll(one, 1), enroll(two, 2)
        one.delete(first)
        two.update(second, ItemUpdate(person_id="somebody"))
        for gallery in (one, two):
            gallery.check()  # follows the store first
            assert nearest(gallery, 2, OLD) == second
            x = embedder(OLD)([new_item(2).crop])[0]
            hits = gallery.search(x, None, top_k=5, filters=Filters(person_id=("somebody",))).hits
            assert [hit.item.id for hit in hits] == [second]
        third = enroll(one, 3)
        deadline = threading.Event()
        for _ in range(100):  # without being asked
            x = embedder(OLD)([new_item(3).crop])[0]
            if two.search(x, None, top_k=1).hits[0].item.id == third:
                break
            deadline.wait(0.1)
        else:
            pytest.fail("the other process's enrollment never came")
        one.reembed(NEXT, embedder(NEXT))
        with pytest.raises(ModelVersionConflict, match="restart"):
            two.check()
        with pytest.raises(ModelVersionConflict):
            enroll(two, 4, OLD)
    finally:
        one.close()
        two.close()


def test_the_new_version_is_announced_before_the_old_one_is_closed(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    enroll(gallery, 1)
    happened: list[str] = []
    close = Follower.close

    def noted(self: Follower) -> None:
        happened.append("closed")
        close(self)

    monkeypatch.setattr(Follower, "close", noted)

    def switched() -> None:
        assert gallery.model == NEXT.fingerprint
        happened.append("switched")

    gallery.reembed(NEXT, embedder(NEXT), switched=switched)
    assert happened == ["switched", "closed"]
