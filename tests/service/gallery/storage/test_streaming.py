"""What caches read: whole, in order, of one moment, and from where they stopped."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from service.errors import GalleryDamaged
from service.gallery.feed import Position, Slice
from service.gallery.records import ItemUpdate
from service.gallery.storage import streaming
from service.gallery.storage.store import Store
from service.gallery.storage.streaming import View
from service.gallery.storage.tables import features, items
from service.gallery.times import microseconds
from tests.service.stores import OTHER, SIZE, OpenStore, all_of, new, rows


@pytest.mark.parametrize("block", [1, 3, 64, 100, 199, 200, 1000])
def test_blocks_hold_everything_once(store: Store, block: int) -> None:
    moment = datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    numbers = [n for n, _ in store.add(new(100), rows(100))]
    numbers += [
        n
        for n, _ in store.add(
            new(100, person_id="p", camera_id="ü", captured_at=moment), rows(100, seed=1)
        )
    ]
    blocks = list(store.stream(block=block))
    assert [len(b.numbers) for b in blocks[:-1]] == [block] * (len(blocks) - 1)
    assert all(len(b.features) == len(b.numbers) for b in blocks)
    assert [n for b in blocks for n in b.numbers] == numbers
    np.testing.assert_array_equal(
        np.concatenate([b.features for b in blocks]),
        np.concatenate([rows(100), rows(100, seed=1)]),
    )
    labels = [
        label
        for b in blocks
        for label in zip(b.persons, b.cameras, b.modalities, b.captured, strict=True)
    ]
    assert labels == [(None, None, "ir", None)] * 100 + [("p", "ü", "ir", 1_000_000)] * 100
    assert list(all_of(store, after=numbers[149], block=block)) == numbers[150:]


LABELS = ['"q"', "a\\b", "line\u2028end", "\x1f", "ß漢😀", "[1,2]", "null", "1", "p" * 128]


@pytest.mark.parametrize("joined", [1, 24, 24 * 7, 1 << 20])
def test_rows_that_are_read_together_are_as_they_were_stored(
    store: Store, monkeypatch: pytest.MonkeyPatch, joined: int
) -> None:
    """Whatever is in labels, also of older releases, and bytes of zero or no text in features."""
    monkeypatch.setattr(streaming, "_JOINED_BYTES", joined)
    far = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    several = new(9) + new(1, captured_at=far)
    values = np.zeros((10, SIZE), np.float16)
    values[1::2] = rows(5)
    values[2] = np.frombuffer(b"\xff\x7b" * SIZE, np.float16)
    numbers = [n for n, _ in store.add(several, values)]
    with store.database.writing() as connection:
        for number, label in zip(numbers, LABELS, strict=False):
            stored = update(items).where(items.c.number == number)
            connection.execute(stored.values(person_id=label))
    found = all_of(store, block=8)
    assert list(found) == numbers
    assert [row[0] for row in found.values()] == [*LABELS, None]
    assert found[numbers[-1]][1:4] == (None, "ir", microseconds(far))
    assert [row[-1] for row in found.values()] == values.tolist()


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
@pytest.mark.parametrize("joined", [24, 24 * 7, 1 << 20])
def test_numbers_may_have_gaps(
    store: Store, monkeypatch: pytest.MonkeyPatch, joined: int, block: int
) -> None:
    """Wide ones and narrow ones, at the beginning, between rows and at the end."""
    monkeypatch.setattr(streaming, "_JOINED_BYTES", joined)
    numbers = [n for n, _ in store.add(new(300), rows(300))]
    kept = [*range(40, 60), *range(61, 90, 2), 200, 250, *range(260, 280)]
    gone = set(range(300)) - set(kept)
    store.delete([numbers[place] for place in gone])
    found = all_of(store, block=block)
    assert list(found) == [numbers[place] for place in kept]
    assert [row[-1] for row in found.values()] == rows(300)[kept].tolist()
    assert list(all_of(store, after=numbers[210], block=block)) == list(found)[-21:]
    assert not all_of(store, after=numbers[279], block=block)


def test_an_sqlite_that_joins_otherwise_is_read_row_by_row(open_store: OpenStore) -> None:
    """Some versions end a joined text at its first byte of zero."""

    class Cut:
        def __init__(self) -> None:
            self.data = b""

        def step(self, data: bytes, between: str) -> None:
            self.data += data

        def finalize(self) -> bytes:
            return self.data.partition(b"\0")[0]

    store = open_store()
    if not store.database.sqlite:
        pytest.skip("PostgreSQL copies rows")
    values = np.zeros((5, SIZE), np.float16)
    store.add(new(5, person_id="p"), values)
    with store.database.reading() as connection:
        driver: Any = connection.connection.driver_connection
        driver.create_aggregate("group_concat", 2, Cut)
        try:
            found = all_of(View(connection, store.model, SIZE), block=2)
        finally:
            driver.create_aggregate("group_concat", 2, None)
    assert [(row[0], row[-1]) for row in found.values()] == [("p", [0.0] * SIZE)] * 5


def test_rows_that_an_sqlite_gives_in_another_order_are_sorted(open_store: OpenStore) -> None:
    class Backwards:
        def __init__(self) -> None:
            self.values: list[Any] = []

        def step(self, value: Any) -> None:
            self.values.append(value)

        def finalize(self) -> str:
            return json.dumps(self.values[::-1])

    store = open_store()
    if not store.database.sqlite:
        pytest.skip("PostgreSQL is told the order")
    numbers = [n for n, _ in store.add(new(5), rows(5))]
    with store.database.reading() as connection:
        driver: Any = connection.connection.driver_connection
        driver.create_aggregate("json_group_array", 1, Backwards)
        try:
            found = all_of(View(connection, store.model, SIZE), block=3)
        finally:
            driver.create_aggregate("json_group_array", 1, None)
    assert list(found) == numbers
    assert [row[-1] for row in found.values()] == rows(5).tolist()


def test_a_reader_may_stop_between_two_blocks(store: Store) -> None:
    store.add(new(9), rows(9))
    with store.view() as view:
        with closing(view.stream(block=2)) as blocks:
            assert len(next(blocks).numbers) == 2
        assert view.count() == len(all_of(view)) == 9


def test_an_empty_store_streams_nothing(store: Store) -> None:
    assert list(store.stream()) == []
    with store.view() as view:
        assert (view.count(), view.position()) == (0, Position(0, 0))
        changed = view.changes_since(Position(0, 0))
    assert (changed.deleted, changed.updated.numbers) == ([], [])


@pytest.mark.parametrize("size", [0, SIZE * 2 - 2, SIZE * 2 + 2])
def test_features_of_another_length_are_damage(store: Store, size: int) -> None:
    numbers = [n for n, _ in store.add(new(70), rows(70))]
    with store.database.writing() as connection:
        wrong = features.c.number == numbers[66]
        connection.execute(update(features).where(wrong).values(data=b"x" * size))
    with pytest.raises(GalleryDamaged, match=f"row {numbers[66]} do not have 24 bytes"):
        all_of(store)
    assert store.count() == 70  # the connection is as good as before


def test_a_view_is_of_one_moment(store: Store) -> None:
    numbers = [n for n, _ in store.add(new(5), rows(5))]
    with store.view() as view:
        position = view.position()
        store.add(new(2), rows(2))
        store.delete(numbers[:1])
        store.update(store.fetch([numbers[1]])[numbers[1]].id, ItemUpdate(person_id="p"))
        assert (view.position(), view.count()) == (position, 5)
        assert sorted(all_of(view, block=2)) == numbers
        assert all_of(view)[numbers[1]][0] is None
        assert view.changes_since(Position(0, 0)).deleted == []
    assert store.count() == 6


def test_a_reader_that_stopped_catches_up(store: Store) -> None:
    """What was read, and then what changed, is what a new reader reads."""
    added = store.add(new(6, person_id="p"), rows(6))
    numbers, ids = [n for n, _ in added], [item.id for _, item in added]
    with store.view() as view:
        cache, position = all_of(view), view.position()
    store.update(ids[0], ItemUpdate(person_id="q", camera_id="c"))
    store.update(ids[1], ItemUpdate(person_id="gone soon"))
    store.delete([numbers[1], numbers[5]])
    late = store.add(new(3), rows(3, seed=1))
    store.delete([late[0][0]])  # this reader never saw it
    store.update(late[1][1].id, ItemUpdate(person_id="new"))
    with store.view() as view:
        changed = view.changes_since(position)
        assert changed.deleted == [numbers[1], numbers[5]]
        assert changed.updated.numbers == [numbers[0]]
        for number in changed.deleted:
            del cache[number]
        new_ones = all_of(view, after=position.item)
        u = changed.updated
        labels = zip(u.persons, u.cameras, u.modalities, u.captured, strict=True)
        for number, label, row in zip(u.numbers, labels, u.features, strict=True):
            cache[number] = (*label, row.tolist())
        cache |= new_ones
        assert cache == all_of(view)
        nothing = view.changes_since(view.position())
        assert (nothing.deleted, nothing.updated.numbers) == ([], [])


def test_features_added_late_to_the_active_version_reach_caches(store: Store) -> None:
    first = store.add(new(1), rows(1))[0][0]
    store.versions.register(OTHER)
    foreign = store.seen_with(OTHER, SIZE).add(new(1), rows(1))[0][0]
    last = store.add(new(1), rows(1))[0][0]
    with store.view() as view:
        position = view.position()
        assert sorted(all_of(view)) == [first, last]
    store.versions.add_features(store.model, [foreign], rows(1, seed=5))
    store.versions.add_features(OTHER, [first, last], rows(2))  # nobody reads that one yet
    with store.view() as view:
        updated = view.changes_since(position).updated
        late = dict(zip(updated.numbers, updated.features.tolist(), strict=True))
        assert late[foreign] == rows(1, seed=5)[0].tolist()
        # Which version a change is of is not recorded; what is read again is what it was.
        assert {number: row[-1] for number, row in all_of(view).items()} == late


def test_numbers_become_visible_in_order(store: Store) -> None:
    """A reader that goes on behind the last number misses nothing, whatever is written at once."""
    from concurrent.futures import ThreadPoolExecutor

    seen: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(store.add, new(3), rows(3)) for _ in range(40)]
        while len(seen) < 120:
            finished = all(write.done() for write in writes)
            seen += all_of(store, after=seen[-1] if seen else 0)
            assert len(seen) == 120 or not finished
    assert len(set(seen)) == 120


@pytest.mark.parametrize("shares", [1, 2, 5])
def test_slices_share_the_gallery(store: Store, shares: int) -> None:
    numbers = [n for n, _ in store.add(new(400), rows(400))]
    store.update(store.fetch([numbers[7]])[numbers[7]].id, ItemUpdate(person_id="p"))
    store.delete(numbers[90:120])
    whole = all_of(store)
    seen: dict[int, object] = {}
    for index in range(shares):
        mine = Slice(index, shares)
        with store.database.reading() as connection:
            view = View(connection, store.model, SIZE, mine)
            found = all_of(view, block=64)
            changed = view.changes_since(Position(numbers[-1], 0))
            assert (view.count(), view.position()) == (len(found), Position(numbers[-1], 31))
        assert list(found) == [n for n in whole if mine.holds(np.array([n]))[0]]
        assert abs(len(found) - 370 / shares) < 40
        assert changed.deleted == numbers[90:120]  # of other slices, too: nobody has them
        assert changed.updated.numbers == [n for n in [numbers[7]] if n in found]
        seen |= found
    assert seen == whole
