"""A gallery in memory: features, recall index and filter columns, searched as one.

The shard is a cache of the store and knows no SQL: it answers with row numbers. Searches hold no
lock: they see the rows that were there when they began. Those of one call run as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np

from model import CMTConfig
from service.gallery.feed import Stored
from service.gallery.index.columns import Columns
from service.gallery.index.figures import IndexChoice
from service.gallery.index.maintenance import Maintenance
from service.gallery.index.ranker import Presence, Ranked, Scale, rank
from service.gallery.index.searcher import Counters, Scored, Searcher, SearchRequest
from service.gallery.index.segment import Segment
from service.gallery.records import IndexKind

__all__ = [
    "Counters",
    "Frozen",
    "Presence",
    "Ranked",
    "Scale",
    "Scored",
    "SearchRequest",
    "Shard",
    "Statistics",
]


@dataclass(frozen=True)
class Statistics:
    """Sizes of a shard.

    items, tombstones: rows alive and deleted. index: the kind that serves recall. indexed: rows in
    it; the others are scanned. on_host: items searched in the host's memory, all of them without a
    GPU. device_bytes: of feature_bytes. rebuilds: how often rows or index were rebuilt since the
    start.
    """

    items: int
    tombstones: int
    index: IndexKind
    indexed: int
    on_host: int
    feature_bytes: int
    device_bytes: int
    column_bytes: int
    rebuilds: int


@dataclass(frozen=True)
class Frozen:
    """A shard at one moment: what a snapshot is written from. Later changes do not show."""

    segment: Segment
    columns: Columns


class Shard:
    """Features of one checkpoint (its `config`) on one device. Thread-safe.

    device: "cpu" or "cuda". kind: of index, see `IndexChoice`.
    """

    def __init__(self, config: CMTConfig, device: str, kind: IndexChoice = None) -> None:
        self._maintenance = maintenance = Maintenance(Segment.empty(config, device), kind)
        # Not by `self`: a cycle would keep a shard's memory after its end.
        self._searcher = Searcher(config, lambda: maintenance.segment)

    def __len__(self) -> int:
        return self._maintenance.segment.columns.alive_count

    def filling(self) -> AbstractContextManager[None]:
        """Put the upkeep off while many items are added in this context."""
        return self._maintenance.filling()

    def load(self, blocks: Iterable[Stored]) -> None:
        """Add many items; searches see each block as soon as it is added."""
        for stored in blocks:
            self.add(stored)

    def add(self, stored: Stored) -> None:
        """Add items, which the next search finds."""
        with self._maintenance.changing:
            self._maintenance.segment.add(stored)
            self._maintenance.wake()

    @contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Hold memory for so many items that are added in this context. Raises NoRoom."""
        with self._maintenance.changing:
            self._maintenance.expect(count)
        try:
            yield
        finally:
            with self._maintenance.changing:
                self._maintenance.forget(count)

    def make_room(self) -> None:
        """Take memory for one more item, if it is not there. Raises NoRoom."""
        with self._maintenance.changing:
            self._maintenance.segment.features.make_room(1)

    def tend(self) -> None:
        """Try again what there was no memory for, and use what has become free. Call regularly."""
        with self._maintenance.changing:
            self._maintenance.wake()

    def mark_deleted(self, numbers: Sequence[int]) -> list[int]:
        """Take items out of every later search → the numbers of those that were here.

        Their memory is freed in the background.
        """
        with self._maintenance.changing:
            deleted = self._maintenance.segment.columns.mark_deleted(numbers)
            self._maintenance.touch(deleted)
            self._maintenance.wake()
            return deleted

    def lacking(self, numbers: Sequence[int]) -> list[int]:
        """Those of these items that are not here, or deleted."""
        columns = self._maintenance.segment.columns
        positions = columns.positions(numbers)
        here = columns.numbers[positions[columns.alive[positions]]]
        return [int(number) for number in np.setdiff1d(numbers, here)]

    def update(
        self,
        numbers: Sequence[int],
        *,
        persons: Sequence[str | None] | None = None,
        cameras: Sequence[str | None] | None = None,
        captured: Sequence[int | None] | None = None,
    ) -> None:
        """Give items new labels, one for each number; None leaves that label of all as it is."""
        with self._maintenance.changing:
            self._maintenance.segment.columns.update(
                numbers, persons=persons, cameras=cameras, captured=captured
            )
            self._maintenance.touch(numbers)

    def search(self, queries: Sequence[SearchRequest]) -> list[Scored]:
        """`Searcher.search`."""
        return self._searcher.search(queries)

    def rank(self, requests: Sequence[tuple[SearchRequest, Scale]]) -> list[Ranked]:
        """`ranker.rank`."""
        return rank(self._searcher, requests)

    @property
    def counters(self) -> Counters:
        """How often each stage of the search ran."""
        return self._searcher.counters

    def freeze(self) -> Frozen:
        """The shard as it is now. A caller that needs its store position prevents changes."""
        segment = self._maintenance.segment
        return Frozen(segment, segment.columns.frozen())

    def restore(self, segment: Segment) -> None:
        """Fill an empty shard with what `snapshot.load` read. Raises ValueError for any other."""
        if len(self._maintenance.segment.columns):
            raise ValueError("only an empty shard can be restored")
        with self._maintenance.changing:
            self._maintenance.segment = segment
            self._maintenance.wake()

    def statistics(self) -> Statistics:
        """Its sizes, and the kind of its index."""
        segment = self._maintenance.segment
        index, columns = segment.index, segment.columns
        return Statistics(
            items=columns.alive_count,
            tombstones=len(columns) - columns.alive_count,
            index="SQfp16" if index is None else index.kind,
            indexed=0 if index is None else len(index),
            on_host=segment.on_host,
            feature_bytes=segment.features.bytes,
            device_bytes=segment.features.device_bytes,
            column_bytes=columns.bytes,
            rebuilds=self._maintenance.rebuilds,
        )

    def wait(self) -> None:
        """Wait until no background work is left."""
        self._maintenance.wait()

    def close(self) -> None:
        """Stop background work, abandoning what is in progress."""
        self._maintenance.close()
