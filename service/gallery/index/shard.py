"""A gallery in memory: features, recall index and filter columns, searched as one.

The shard is a cache of the store and knows no SQL: it answers with row numbers. Searches hold no
lock: they see the rows there were when they began. Those of one call run as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from model import CMTConfig
from service.gallery.feed import Stored
from service.gallery.index.columns import Columns
from service.gallery.index.maintenance import Upkeep
from service.gallery.index.recall_index import IndexKind
from service.gallery.index.searcher import Counters, Scored, Searcher, Sought
from service.gallery.index.segment import Resident

__all__ = ["Counters", "Frozen", "Scored", "Shard", "Sought", "Statistics"]


@dataclass(frozen=True)
class Statistics:
    """index: the kind that serves recall. indexed: rows in it; the others are scanned."""

    items: int
    tombstones: int
    index: IndexKind
    indexed: int
    feature_bytes: int
    column_bytes: int
    rebuilds: int


@dataclass(frozen=True)
class Frozen:
    """A shard at one moment: what a snapshot is written from. Later changes do not show."""

    resident: Resident
    columns: Columns


class Shard:
    """Features of one checkpoint (its `config`) on one device. Thread-safe.

    device: "cpu" or "cuda". kind: forces a kind of index; None lets `choose_kind` choose.
    """

    def __init__(self, config: CMTConfig, device: str, kind: IndexKind | None = None) -> None:
        self._upkeep = Upkeep(Resident.empty(config, device), kind)
        self._searcher = Searcher(config, lambda: self._upkeep.resident)

    def __len__(self) -> int:
        return self._upkeep.resident.columns.alive_count

    def load(self, blocks: Iterable[Stored]) -> None:
        """Add many items; searches see each block when it is in."""
        for stored in blocks:
            self.add(stored)

    def add(self, stored: Stored) -> None:
        """The next search finds them."""
        with self._upkeep.changing:
            self._upkeep.resident.add(stored)
            self._upkeep.wake()

    def bury(self, numbers: Sequence[int]) -> list[int]:
        """Take items out of every later search → those that were here.

        Their memory is given back in the background.
        """
        with self._upkeep.changing:
            buried = self._upkeep.resident.columns.bury(numbers)
            self._upkeep.touch(buried)
            self._upkeep.wake()
            return buried

    def lacking(self, numbers: Sequence[int]) -> list[int]:
        """Those of these items that are not here, or deleted."""
        columns = self._upkeep.resident.columns
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
        """New labels, one for each number; None leaves that label of all of them as it is."""
        with self._upkeep.changing:
            self._upkeep.resident.columns.update(
                numbers, persons=persons, cameras=cameras, captured=captured
            )
            self._upkeep.touch(numbers)

    def search(self, queries: Sequence[Sought]) -> list[Scored]:
        """`Searcher.search`."""
        return self._searcher.search(queries)

    @property
    def counters(self) -> Counters:
        return self._searcher.counters

    def freeze(self) -> Frozen:
        """The shard as it is now. Whoever needs a store position with it holds changes off."""
        resident = self._upkeep.resident
        return Frozen(resident, resident.columns.frozen())

    def restore(self, resident: Resident) -> None:
        """Take what `snapshot.load` read into an empty shard."""
        if len(self._upkeep.resident.columns):
            raise ValueError("only an empty shard can be restored")
        with self._upkeep.changing:
            self._upkeep.resident = resident
            self._upkeep.wake()

    def statistics(self) -> Statistics:
        resident = self._upkeep.resident
        index, columns = resident.index, resident.columns
        return Statistics(
            items=columns.alive_count,
            tombstones=len(columns) - columns.alive_count,
            index="SQfp16" if index is None else index.kind,
            indexed=0 if index is None else len(index),
            feature_bytes=resident.features.bytes,
            column_bytes=columns.bytes,
            rebuilds=self._upkeep.rebuilds,
        )

    def wait(self) -> None:
        """Until the background has nothing left to do."""
        self._upkeep.wait()

    def close(self) -> None:
        """Stop background work, giving up what is under way."""
        self._upkeep.close()
