"""The gallery in memory: every kind of index, many threads at once, rebuilds beside service."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import CMTConfig, Modulation, part_distances
from service.gallery.feed import Stored
from service.gallery.index import maintenance as maintenance
from service.gallery.index.columns import Columns
from service.gallery.index.features import Features
from service.gallery.index.recall_index import (
    IVF_FROM,
    KINDS,
    RecallIndex,
    choose_kind,
    index_bytes,
)
from service.gallery.index.segment import build_index
from service.gallery.index.shard import Scored, SearchRequest, Shard
from service.gallery.records import Filters, IndexKind
from service.gallery.times import microseconds

PARTS, DIM, COUNT = 3, 16, 3000
CONFIG = CMTConfig(input_height=96, input_width=48, parts=PARTS, dim=DIM, heads=2)
EVERYONE = Filters()


def features(count: int = COUNT, seed: int = 0) -> Tensor:
    return torch.randn(count, PARTS, DIM, generator=torch.Generator().manual_seed(seed))


def stored(y: Tensor, first: int = 0, person: str | None = None) -> Stored:
    """Items `first`, `first` + 1, …; the first one, the next 5 and the next 11 are of a person."""
    count = len(y)
    names = ["one"] + ["five"] * 5 + ["eleven"] * 11
    return Stored(
        numbers=list(range(first, first + count)),
        persons=[
            person or (names[i] if i < len(names) else f"p{i % 50}")
            for i in range(first, first + count)
        ],
        cameras=[f"c{i % 3}" for i in range(first, first + count)],
        modalities=["rgb"] * count,
        captured=[None] * count,
        features=y.flatten(1).half().numpy(),
    )


def query(seed: int = 1) -> tuple[Tensor, Modulation]:
    generator = torch.Generator().manual_seed(seed)
    gamma = 1 + 0.5 * torch.randn(1, DIM, generator=generator)
    return features(1, seed)[0], Modulation(gamma, 0.3 * features(1, seed)[0, :1])


def ranking(y: Tensor, seed: int) -> list[int]:
    """All items by distance in float64."""
    x, modulation = query(seed)
    doubles = Modulation(*(p.double() for p in modulation))
    parts = part_distances(x[None].double(), y.half().double(), doubles)
    return np.argsort(parts[0].sum(1).numpy(), kind="stable").tolist()  # type: ignore[no-any-return]


def search(
    shard: Shard, seed: int, count: int, *, exhaustive: bool = False, filters: Filters = EVERYONE
) -> Scored:
    x, modulation = query(seed)
    (scored,) = shard.search([SearchRequest(x, modulation, count, count, exhaustive, filters)])
    return scored


@contextmanager
def shard_of(kind: IndexKind | None = "SQfp16", y: Tensor | None = None) -> Iterator[Shard]:
    shard = Shard(CONFIG, "cpu", kind)
    if y is not None:
        shard.add(stored(y))
        shard.wait()
    yield shard
    shard.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_the_near_and_never_starves_a_filter(
    kind: IndexKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.gallery.index.recall_index.NPROBE_SHARE", 0.05)
    y = features()
    people = stored(y).persons
    with shard_of(kind, y) as shard:
        statistics = shard.statistics()
        assert statistics.index == kind
        assert statistics.indexed == (0 if kind == "SQfp16" else COUNT)
        for seed in range(5):
            order = ranking(y, seed)
            wide = search(shard, seed, 300).numbers.tolist()
            assert len(wide) == 300
            # Random vectors have no neighbourhoods: lists and graphs miss some of them.
            least = 9 if kind in ("SQfp16", "Flat", "SQ8") else 2
            assert len(set(wide[:10]) & set(order[:10])) >= least
            for person, matches in {"one": 1, "five": 5, "eleven": 11, "p40": 60}.items():
                filters = Filters(person_id=(person,))
                mine = [number for number in order if people[number] == person]
                assert search(shard, seed, 10, filters=filters).numbers.tolist() == mine[:10]
                everyone = search(shard, seed, COUNT, filters=filters)
                assert len(everyone.numbers) == everyone.searched == len(mine) == matches


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "SQfp16"])
def test_a_wide_filter_gets_all_it_asks_for(
    kind: IndexKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too wide to be scanned at once, yet more is asked for than the probed lists hold."""
    monkeypatch.setattr("service.gallery.index.recall._SHORTLISTS", 0)
    monkeypatch.setattr("service.gallery.index.recall_index.NPROBE_SHARE", 0.01)
    y = features()
    with shard_of(kind, y) as shard:
        filters = Filters(camera_id=("c1",))
        for count in (999, 1000, 1001):
            scored = search(shard, 3, count, filters=filters)
            assert len(scored.numbers) == min(count, 1000)
            assert set(scored.numbers % 3) == {1}


@pytest.mark.parametrize("kind", ["IVF-SQ8", "HNSW"])
def test_rows_that_the_index_lacks_are_found_too(kind: IndexKind) -> None:
    y = features(COUNT + 50)
    with shard_of(kind, y[:COUNT]) as shard:
        shard.add(stored(y[COUNT:], COUNT))
        assert shard.statistics().indexed == COUNT
        for number in (COUNT, COUNT + 49):
            plain = Modulation.identity(1, DIM)
            (scored,) = shard.search([SearchRequest(y[number], plain, 20, 20)])
            assert scored.numbers[0] == number
        shard.add(stored(features(1500, 9), COUNT + 50))
        shard.wait()
        assert shard.statistics().indexed == COUNT + 1550


def test_a_scan_serves_until_the_index_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built, go = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> RecallIndex:
        built.set()
        assert go.wait(60)
        return build_index(*arguments)

    monkeypatch.setattr(maintenance, "build_index", slow)
    y = features()
    shard = Shard(CONFIG, "cpu", "IVF-Flat")
    shard.add(stored(y))
    assert built.wait(60)
    assert shard.statistics().index == "SQfp16"
    assert search(shard, 2, 10).numbers.tolist() == ranking(y, 2)[:10]
    go.set()
    shard.wait()
    assert shard.statistics().index == "IVF-Flat"
    shard.close()


def test_a_failed_build_leaves_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> RecallIndex:
        raise MemoryError

    monkeypatch.setattr(maintenance, "build_index", fails)
    y = features()
    with shard_of("IVF-SQ8", y) as shard:
        assert search(shard, 2, 10).numbers.tolist() == ranking(y, 2)[:10]


def test_the_rule_for_the_kind() -> None:
    width = 896
    asked: list[int] = []

    def chosen(count: int, device: str, free: int) -> IndexKind:
        def free_bytes() -> int:
            asked.append(count)
            return free

        return choose_kind(count, device, free_bytes, width)

    assert chosen(IVF_FROM - 1, "cpu", 0) == "SQfp16"
    assert chosen(10 * IVF_FROM, "cuda", 0) == "SQfp16"
    assert not asked  # for memory that is not needed
    assert chosen(IVF_FROM, "cpu", 1 << 40) == "IVF-SQ8"
    assert chosen(IVF_FROM, "cpu", index_bytes("IVF-SQ8", IVF_FROM, width)) == "SQfp16"
    assert asked == [IVF_FROM, IVF_FROM]
    with shard_of(None, features()) as shard:
        assert shard.statistics().index == "SQfp16"


@pytest.mark.parametrize("kind", ["SQfp16", "Flat", "IVF-SQ8"])
def test_queries_of_one_call_and_of_threads_get_what_one_alone_gets(kind: IndexKind) -> None:
    y = features()
    with shard_of(kind, y) as shard:
        work = [
            (
                seed,
                10 + seed % 3,
                seed % 2 == 0,
                Filters(camera_id=("c1",)) if seed % 5 else EVERYONE,
            )
            for seed in range(60)
        ]

        def ask(job: tuple[int, int, bool, Filters]) -> Scored:
            seed, count, exhaustive, filters = job
            return search(shard, seed, count, exhaustive=exhaustive, filters=filters)

        alone = [ask(job) for job in work]
        assert shard.counters.largest_batch == 1
        with ThreadPoolExecutor(16) as threads:
            beside = list(threads.map(ask, work))
        together = shard.search(
            [
                SearchRequest(*query(seed), count, count, exhaustive, filters)
                for seed, count, exhaustive, filters in work
            ]
        )
        assert shard.counters.largest_batch == 30  # all that are exhaustive
        assert shard.counters.recall_calls == shard.counters.exhaustive_calls == 90
        assert shard.counters.rescore_calls == 180
        for one, other in zip(2 * alone, [*beside, *together], strict=True):
            assert np.array_equal(one.numbers, other.numbers)
            assert np.array_equal(one.distances, other.distances)
            assert one.searched == other.searched
            if one.recall_ranks is not None and other.recall_ranks is not None:
                assert np.array_equal(one.recall_ranks, other.recall_ranks)


@pytest.mark.parametrize("kind", ["SQfp16", "IVF-Flat"])
def test_changes_during_a_rebuild_are_not_lost(
    kind: IndexKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads add, mark_deleted, relabel and search while the shard is compacted many times."""
    monkeypatch.setattr(maintenance, "_TOMBSTONE_LEAST", 20)
    monkeypatch.setattr(maintenance, "_TOMBSTONE_SHARE", 0.0)
    y = features(8000)
    with shard_of(kind, y[:2000]) as shard:
        errors: list[BaseException] = []

        def guarded(work: object) -> threading.Thread:
            def run() -> None:
                try:
                    work()  # type: ignore[operator]
                except BaseException as error:
                    errors.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        def add() -> None:
            for start in range(2000, 8000, 60):
                shard.add(stored(y[start : start + 60], start))

        def delete() -> None:
            for start in range(0, 1500, 5):
                numbers = list(range(start, start + 5))
                assert shard.mark_deleted(numbers) == numbers
                assert search(shard, start, 30).numbers.min() > start + 4

        def rename() -> None:
            for start in range(1500, 2000, 10):
                shard.update(list(range(start, start + 10)), persons=["renamed"] * 10)
                time.sleep(0.005)

        def ask() -> None:
            for seed in range(150):
                scored = search(shard, seed, 40, exhaustive=seed % 2 == 0)
                assert len(scored.numbers) == len(set(scored.numbers)) == 40

        for thread in [guarded(work) for work in (add, delete, rename, ask)]:
            thread.join(120)
        assert not errors
        shard.wait()
        assert shard.statistics().rebuilds > 3
        assert len(shard) == 6500
        assert shard.statistics().tombstones < 20
        for seed in range(4):
            expected = [n for n in ranking(y, seed) if n >= 1500]
            assert search(shard, seed, 100, exhaustive=True).numbers.tolist() == expected[:100]
        renamed = search(shard, 0, 600, filters=Filters(person_id=("renamed",)))
        assert sorted(renamed.numbers) == list(range(1500, 2000))


def test_closing_ends_background_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.gallery.index.segment._BLOCK_ROWS", 10)
    before = threading.active_count()
    shard = Shard(CONFIG, "cpu", "HNSW")
    shard.add(stored(features()))
    shard.close()
    assert threading.active_count() == before
    assert shard.statistics().index == "SQfp16"


def test_labels_change_in_place() -> None:
    moment = datetime(2026, 5, 1, tzinfo=UTC)
    with shard_of(y=features(100)) as shard:
        shard.update([42, 7, 999], persons=["new", None, "x"], cameras=["gate", "c1", "x"])
        shard.update([42], captured=[microseconds(moment)])
        for filters, expected in {
            Filters(person_id=("new",)): [42],
            Filters(camera_id=("gate",)): [42],
            Filters(captured_from=moment): [42],
            Filters(person_id=("x",)): [],
        }.items():
            assert search(shard, 0, 10, filters=filters).numbers.tolist() == expected
        assert 7 not in search(shard, 0, 100, filters=Filters(person_id=("eleven",))).numbers
        scored = search(shard, 0, 100)
        assert scored.persons[scored.numbers.tolist().index(7)] < 0
        shard.update([42], captured=[None])
        assert search(shard, 0, 10, filters=Filters(captured_from=moment)).searched == 0


def test_columns_find_numbers_in_any_order() -> None:
    columns = Columns()
    block = stored(features(6))
    for numbers in ([5, 9, 12], [20, 7, 30]):
        columns.add(
            Stored(numbers, [*"abc"], [*"abc"], ["rgb"] * 3, [None] * 3, block.features[:3])
        )
        assert columns.mark_deleted([numbers[1], 999]) == [numbers[1]]
        assert columns.mark_deleted([numbers[1]]) == []
    assert columns.alive_count == 4
    assert columns.alive.tolist() == [True, False, True, True, False, True]


def test_a_filter_reads_labels_that_change_meanwhile() -> None:
    """Cameras are patched while a query filters by one: no row may be looked up by two codes."""
    count = 20_000
    columns = Columns()
    numbers = list(range(1, count + 1))
    rows = np.zeros((count, 1), np.float16)
    columns.add(Stored(numbers, [None] * count, ["north"] * count, ["rgb"] * count, numbers, rows))  # type: ignore[arg-type]
    columns.update(numbers[:500], cameras=[f"gate {n}" for n in range(500)])  # many later codes
    half = numbers[: count // 2]
    stop = threading.Event()

    def patch() -> None:
        while not stop.is_set():
            for camera in ("moved", "north"):
                columns.update(half, cameras=[camera] * len(half))

    thread = threading.Thread(target=patch)
    thread.start()
    try:
        for _ in range(1000):
            allowed = columns.frozen().mask(Filters(camera_id=("north",)))
            assert allowed[len(half) :].all()
    finally:
        stop.set()
        thread.join()


NAN = float("nan")
BAD: dict[str, tuple[Tensor, Modulation, int, str]] = {
    "another shape": (features(1)[0, :2], query()[1], 5, r"shape \(2, 16\)"),
    "a batch": (features(1), query()[1], 5, "shape"),
    "γ of two queries": (features(1)[0], Modulation.identity(2, DIM), 5, "γ and β"),
    "NaN in x": (features(1)[0] * NAN, query()[1], 5, "not finite"),
    "infinity in γ": (
        features(1)[0],
        Modulation(torch.full((1, DIM), float("inf")), torch.zeros(1, DIM)),
        5,
        "not finite",
    ),
    "NaN in β": (
        features(1)[0],
        Modulation(torch.ones(1, DIM), torch.full((1, DIM), NAN)),
        5,
        "not finite",
    ),
    "no result wanted": (*query(), 0, "at least one"),
}


@pytest.mark.parametrize("name", BAD)
def test_senseless_queries_are_refused_with_a_sentence(name: str) -> None:
    x, modulation, count, message = BAD[name]
    with shard_of(y=features(50)) as shard, pytest.raises(ValueError, match=message):
        shard.search([SearchRequest(x, modulation, count, count)])


def test_an_index_is_built_once_much_has_been_added() -> None:
    with shard_of("Flat") as shard:
        with shard.filling():
            shard.add(stored(features()))
            shard.wait()
            assert (shard.statistics().indexed, len(shard)) == (0, COUNT)
        shard.wait()
        assert (shard.statistics().indexed, shard.statistics().rebuilds) == (COUNT, 1)


def test_a_compaction_forgets_labels_that_no_item_has() -> None:
    with shard_of(y=features(400)) as shard:
        for number in range(100):
            shard.update([5], persons=[f"was-{number}"], cameras=[None])
        shard.mark_deleted(range(10, 390))
        shard.wait()
        shard.update([6], persons=["new"])
        columns = shard._maintenance.segment.columns
        assert len(columns) == 20
        assert set(columns._persons._codes) == {"one", "five", "eleven", "was-99", "new"} | {
            f"p{number % 50}" for number in range(390, 400)
        }
        for person, numbers in (("was-99", {5}), ("new", {6}), ("five", {1, 2, 3, 4})):
            found = search(shard, 1, 20, filters=Filters(person_id=(person,)))
            assert set(found.numbers.tolist()) == numbers
        at = [n for n in (*range(10), *range(390, 400)) if n % 3 == 2 and n != 5]
        assert len(search(shard, 1, 20, filters=Filters(camera_id=("c2",))).numbers) == len(at)


def test_a_mask_is_computed_once_until_something_changes() -> None:
    columns = Columns()
    columns.add(stored(features(40)))
    north = Filters(camera_id=("c1",))
    mask = columns.frozen().mask(north)
    assert columns.frozen().mask(north) is mask
    assert columns.frozen().mask(Filters()) is not mask
    kept = mask.tolist()
    changes: list[tuple[Any, int]] = [
        (lambda: columns.add(stored(features(3), 40)), len(kept) // 3 + 1),
        (lambda: columns.mark_deleted([1]), len(kept) // 3),
        (lambda: columns.update([2], cameras=["c1"]), len(kept) // 3 + 1),
        (lambda: columns.mark_deleted([2, 4]), len(kept) // 3 - 1),
    ]
    for change, passing in changes:
        change()
        now = columns.frozen().mask(north)
        assert int(now.sum()) == passing
        assert columns.frozen().mask(north) is now
    assert mask.tolist() == kept
    for number in range(30):  # only the latest are kept
        columns.frozen().mask(Filters(person_id=(f"p{number}",)))
    assert columns.frozen().mask(north) is not now
    assert columns.frozen().mask(north).tolist() == now.tolist()


def test_labels_keep_their_meaning_in_codes_of_another() -> None:
    def block(*numbers: int, persons: list[str | None]) -> Stored:
        return Stored(
            list(numbers), persons, [None] * len(numbers), ["ir"] * len(numbers),
            [None] * len(numbers), np.zeros((len(numbers), 1), np.float16),
        )  # fmt: skip

    old, new = Columns(), Columns()
    old.add(block(1, 2, 3, 4, persons=["a", None, "b", "c"]))
    new.extend(old, np.array([1, 3]))
    assert new._persons.decode(new.persons) == [None, "c"]
    old.update([2, 4], persons=["b", "d"])
    old.mark_deleted([4])
    new.align(old, [2, 4])
    assert new._persons.decode(new.persons) == ["b", "d"]
    assert (new.alive.tolist(), new.alive_count) == ([True, False], 1)
    assert new.mask(Filters(person_id=("b",))).tolist() == [True, False]


def test_equal_rows_get_equal_numbers_wherever_they_lie() -> None:
    generator = torch.Generator().manual_seed(5)
    row = torch.randn(1, 3 * 16, generator=generator).half().numpy()
    x = torch.randn(3, 16, generator=generator)
    numbers: set[float] = set()
    for count in range(1, 40):  # a product of a matrix treats its last rows in another way
        features = Features(3, 16, "euclidean", "cpu")
        features.add(np.repeat(row, count, axis=0))
        numbers.update(features.score_all(x, Modulation.identity(1, 16)).tolist())
    assert len(numbers) == 1
