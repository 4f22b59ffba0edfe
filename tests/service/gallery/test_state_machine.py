"""The gallery against a plain list of what it should hold, over random sequences of calls.

`pytest --hypothesis-show-statistics` says how often each kind of answer was met.
"""

from __future__ import annotations

import io
import math
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from PIL import Image

from model import CheckpointInfo, CMTConfig, Modulation
from service.errors import ItemNotFound
from service.gallery import Filters, Gallery, Hit, Item, ItemUpdate, NewItem
from service.images.decode import Crop, decode

PARTS, DIM = 2, 4
CONFIG = CMTConfig(input_height=96, input_width=48, parts=PARTS, dim=DIM, heads=2)
START = datetime(2026, 1, 1, tzinfo=UTC)
TOLERANCE = 1e-4  # of a distance: both sides compute it directly, one of them in fp32

Vector = tuple[float, ...]  # P·D numbers, part after part


def picture(modality: str, seed: int) -> Crop:
    """A crop of 16×32 noise, gray if it is infrared."""
    noise = random.Random(seed).randbytes(16 * 32)
    buffer = io.BytesIO()
    Image.frombytes("L", (16, 32), noise).save(buffer, "PNG")
    return decode(buffer.getvalue(), modality=modality)  # type: ignore[arg-type]


CROPS = {(kind, seed): picture(kind, seed) for kind in ("rgb", "ir") for seed in range(3)}
PERSONS = ("ann", "bob", "çelik; --")
CAMERAS = ("gate", "hall")
MANY = 15  # items
MOMENTS = tuple(START + timedelta(hours=hour) for hour in range(4))

# Few vectors and few values, so that equal and nearly equal items and queries come up. All are
# exact in fp16, so that the model may compute with what was enrolled.
numbers = st.sampled_from([-1.0, 0.0, 0.0009765625, 0.5, 0.5009765625, 2.0])
vectors = st.sampled_from(
    [
        (0.0,) * (PARTS * DIM),
        (0.5,) * (PARTS * DIM),
        (0.5,) * (PARTS * DIM - 1) + (0.5009765625,),
        (2.0, -1.0) * (PARTS * DIM // 2),
    ]
) | st.tuples(*[numbers] * (PARTS * DIM))
scales = st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 1.5])] * DIM)
shifts = st.tuples(*[st.sampled_from([-0.25, 0.0, 0.25])] * DIM)
modulations = st.none() | st.tuples(scales, shifts)
entries = st.tuples(
    st.sampled_from([*CROPS]),
    st.none() | st.sampled_from(PERSONS),
    st.none() | st.sampled_from(CAMERAS),
    st.none() | st.sampled_from(MOMENTS),
    st.sampled_from([{}, {"note": "ü"}]),
    vectors,
)
batches = st.lists(entries, min_size=1, max_size=8)
filters = st.builds(
    Filters,
    person_id=st.sampled_from([(), (), ("ann",), ("ann", "bob", "nobody")]),
    camera_id=st.sampled_from([(), (), ("gate",), CAMERAS]),
    exclude_camera_id=st.sampled_from([(), (), ("hall",)]),
    gallery_modality=st.sampled_from([(), (), ("rgb",), ("rgb", "ir")]),
    captured_from=st.none() | st.sampled_from(MOMENTS),
    captured_to=st.none() | st.sampled_from(MOMENTS),
)


updates = st.builds(
    ItemUpdate,
    person_id=st.none() | st.sampled_from(PERSONS),
    camera_id=st.none() | st.sampled_from(CAMERAS),
    captured_at=st.none() | st.sampled_from(MOMENTS),
)


def made_by(version: int, crop: Crop) -> Vector:
    """What checkpoint number `version` computes for a crop; exact in fp16."""
    dice = random.Random(f"{version} {crop.sha256} {crop.modality}")
    return tuple(dice.choice([-1.0, 0.5, 2.0]) for _ in range(PARTS * DIM))


class Call(NamedTuple):
    """What a search is asked, apart from its way."""

    x: Vector
    modulation: tuple[Vector, Vector] | None
    top_k: int
    candidates: int | None
    filters: Filters
    by_person: bool
    max_distance: float | None
    explain: bool


searches = st.builds(
    Call,
    vectors,
    modulations,
    top_k=st.sampled_from([1, 2, 5, 100]),
    candidates=st.none() | st.integers(1, 10),
    filters=st.just(Filters()) | filters,
    by_person=st.booleans(),
    max_distance=st.none() | st.sampled_from([0.0, 1.0, 2.5]),
    explain=st.booleans(),
)


@dataclass(frozen=True)
class Expected:
    """One item of the model."""

    item: Item
    new: NewItem
    y: Vector

    def passes(self, wanted: Filters) -> bool:
        """The rules of `Filters`, written once more as plain conditions."""
        item = self.item
        timed = wanted.captured_from is not None or wanted.captured_to is not None
        return (
            (not wanted.person_id or item.person_id in wanted.person_id)
            and (not wanted.camera_id or item.camera_id in wanted.camera_id)
            and item.camera_id not in wanted.exclude_camera_id
            and (not wanted.gallery_modality or item.modality in wanted.gallery_modality)
            and (not timed or item.captured_at is not None)
            and (wanted.captured_from is None or item.captured_at >= wanted.captured_from)  # type: ignore[operator]
            and (wanted.captured_to is None or item.captured_at < wanted.captured_to)  # type: ignore[operator]
        )

    def distance(self, x: Vector, modulation: tuple[Vector, Vector] | None) -> float:
        """√Σ ‖xᵢ − (γ⊙yᵢ + β)‖² number by number."""
        gamma, beta = modulation or ((1.0,) * DIM, (0.0,) * DIM)
        terms = (x[k] - (gamma[k % DIM] * self.y[k] + beta[k % DIM]) for k in range(PARTS * DIM))
        return math.sqrt(sum(term**2 for term in terms))

    @property
    def group(self) -> str:
        return self.item.person_id or self.item.id


class GalleryMachine(RuleBasedStateMachine):
    """Every rule calls the gallery and compares; `self.expected` holds what was acknowledged."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.expected: dict[str, Expected] = {}
        self.erased: set[str] = set()
        self.version = 0

    @property
    def info(self) -> CheckpointInfo:
        return CheckpointInfo(f"{self.version:064x}", CONFIG)

    @initialize(target=ids, candidates=st.sampled_from([1, 3, 256]), batch=batches)
    def open(self, candidates: int, batch: list[tuple[Any, ...]]) -> Any:
        self.candidates = candidates
        self.gallery = Gallery.open(self.folder, self.info, candidates=candidates)
        return self._enroll(batch)

    def teardown(self) -> None:
        if hasattr(self, "gallery"):
            self.gallery.close()
        shutil.rmtree(self.folder)

    # --- changes ---

    @rule(target=ids, batch=batches)
    def enroll(self, batch: list[tuple[Any, ...]]) -> Any:
        return self._enroll(batch)

    @rule(item_id=consumes(ids))
    def delete(self, item_id: str) -> None:
        if item_id in self.erased:  # with its person, before
            with pytest.raises(ItemNotFound):
                self.gallery.delete(item_id)
            return
        self.gallery.delete(item_id)
        self._forget([item_id])

    @precondition(lambda self: len(self.expected) > MANY)  # else nothing would ever grow
    @rule(person=st.sampled_from(PERSONS))
    def delete_person(self, person: str) -> None:
        theirs = [i for i, e in self.expected.items() if e.item.person_id == person]
        assert self.gallery.delete_where(person) == len(theirs)
        self._forget(theirs)

    @rule(item_id=ids, changed=updates)
    def update(self, item_id: str, changed: ItemUpdate) -> None:
        if item_id in self.erased:
            with pytest.raises(ItemNotFound):
                self.gallery.update(item_id, changed)
            return
        expected = self.expected[item_id]
        item = replace(expected.item, **changed.fields)
        assert self.gallery.update(item_id, changed) == item
        self.expected[item_id] = replace(expected, item=item)

    @precondition(lambda self: self.version < 3)
    @rule(dropped=st.booleans())
    def reembed(self, dropped: bool) -> None:
        old = self.info.fingerprint
        self.version += 1
        version = self.version

        def embed(crops: Sequence[Crop]) -> torch.Tensor:
            return torch.tensor([made_by(version, crop) for crop in crops]).view(-1, PARTS, DIM)

        self.gallery.reembed(self.info, embed)
        for item_id, expected in self.expected.items():
            item = replace(expected.item, model=self.info.fingerprint)
            y = made_by(version, expected.new.crop)
            self.expected[item_id] = replace(expected, item=item, y=y)
        if dropped:
            self.gallery.drop_version(old)

    @rule(save=st.booleans())
    def reopen(self, save: bool) -> None:
        if save:
            assert self.gallery.save_index()
        self._reopen()

    @rule(data=st.data(), damage=st.sampled_from(["removed", "truncated", "flipped"]))
    def reopen_with_a_damaged_index(self, data: st.DataObject, damage: str) -> None:
        assert self.gallery.save_index()
        self.gallery.close()
        file = data.draw(st.sampled_from(self._index_files()))
        content = file.read_bytes()
        if damage == "removed":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(content[: len(content) // 2])
        else:
            middle = len(content) // 2
            flipped = bytes(byte ^ 0x10 for byte in content[middle : middle + 1])
            file.write_bytes(content[:middle] + flipped + content[middle + 1 :])
        event(f"index file {damage}")
        self._reopen()

    # --- answers ---

    @rule(item_id=ids)
    def get(self, item_id: str) -> None:
        if item_id in self.erased:
            for call in (self.gallery.get, self.gallery.image):
                with pytest.raises(ItemNotFound):
                    call(item_id)
            return
        expected = self.expected[item_id]
        assert self.gallery.get(item_id) == expected.item
        crop = expected.new.crop
        assert self.gallery.image(item_id) == (crop.data, crop.media_type)

    @rule(wanted=filters, limit=st.integers(1, 4))
    def list_pages(self, wanted: Filters, limit: int) -> None:
        matching = [e.item for e in self.expected.values() if e.passes(wanted)]
        listed: list[Item] = []
        cursor = None
        while True:
            page = self.gallery.list(wanted, limit, cursor)
            assert page.total == len(matching)
            assert len(page.items) <= limit
            listed += page.items
            cursor = page.next_cursor
            if cursor is None:
                break
        assert listed == matching

    @rule(call=searches)
    def search(self, call: Call) -> None:
        self._search(call, exhaustive=False)

    @rule(call=searches)
    def search_exhaustively(self, call: Call) -> None:
        self._search(call, exhaustive=True)

    @invariant()
    def index_and_store_agree(self) -> None:
        if hasattr(self, "gallery"):
            self.gallery.check()
            assert len(self.gallery) == len(self.expected)

    # --- parts of the above ---

    def _search(self, call: Call, *, exhaustive: bool) -> None:
        modulation = call.modulation
        result = self.gallery.search(
            torch.tensor(call.x).view(PARTS, DIM),
            None if modulation is None else Modulation(*(torch.tensor([p]) for p in modulation)),
            top_k=call.top_k,
            candidates=call.candidates,
            exhaustive=exhaustive,
            filters=call.filters,
            group_by="person_id" if call.by_person else None,
            max_distance=call.max_distance,
            explain=call.explain,
        )
        allowed = [e for e in self.expected.values() if e.passes(call.filters)]
        assert (result.searched, result.exhaustive) == (len(allowed), exhaustive)
        distances = {e.item.id: e.distance(call.x, modulation) for e in allowed}
        for hit in result.hits:
            assert hit.item == self.expected[hit.item.id].item
            assert hit.distance == pytest.approx(distances[hit.item.id], abs=TOLERANCE)
            if call.explain:
                assert math.sqrt(sum(hit.parts or ())) == pytest.approx(hit.distance)
        self._compare(result.hits, allowed, distances, call)

    def _enroll(self, batch: Sequence[tuple[Any, ...]]) -> Any:
        new = [NewItem(CROPS[crop], *labels) for crop, *labels, _ in batch]
        rows = [row for *_, row in batch]
        items = self.gallery.add(new, torch.tensor(rows).view(-1, PARTS, DIM))
        for item, new_, y in zip(items, new, rows, strict=True):
            assert item.id not in self.expected
            self.expected[item.id] = Expected(item, new_, y)
        return multiple(*(item.id for item in items))

    def _compare(
        self,
        hits: Sequence[Hit],
        allowed: Sequence[Expected],
        distances: dict[str, float],
        call: Call,
    ) -> None:
        """The hits are the nearest in order; who of those at equal distance is left open."""
        best: dict[str, float] = {}
        for expected in allowed:
            group = expected.group if call.by_person else expected.item.id
            best[group] = min(best.get(group, math.inf), distances[expected.item.id])
        ranking = sorted(best.values())[: call.top_k]
        found = [hit.distance for hit in hits]
        if call.max_distance is not None:  # what is on the limit may fall to either side
            assert all(distance <= call.max_distance for distance in found)
            sure = sum(distance < call.max_distance - TOLERANCE for distance in ranking)
            assert sure <= len(found)
            assert all(d <= call.max_distance + TOLERANCE for d in ranking[: len(found)])
            ranking = ranking[: len(found)]
        assert found == sorted(found)
        assert found == pytest.approx(ranking, abs=TOLERANCE)
        groups = [self.expected[h.item.id].group if call.by_person else h.item.id for h in hits]
        assert len(set(groups)) == len(groups)
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
        ties = len(ranking) - len({round(distance, 3) for distance in ranking})
        event("search with ties" if ties else "search without ties")

    def _forget(self, ids: Sequence[str]) -> None:
        for item_id in ids:
            del self.expected[item_id]
        self.erased.update(ids)

    def _reopen(self) -> None:
        self.gallery.close()
        self.gallery = Gallery.open(self.folder, self.info, candidates=self.candidates)

    def _index_files(self) -> list[Path]:
        return sorted(p for p in (self.folder / "index").rglob("*") if p.is_file())


TestGallery = GalleryMachine.TestCase
TestGallery.settings = settings(
    max_examples=20,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
