"""A gallery in memory: features, recall index and filter columns, searched as one.

The shard is a cache of the store and knows no SQL: it answers with row numbers. Searches run side
by side; changes wait for them and are short. Positions are the same in all three members.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model import CMTConfig, Modulation, project
from service.gallery.columns import Columns
from service.gallery.index import RecallIndex
from service.gallery.records import Filters
from service.gallery.rescoring import Features
from service.gallery.store import Stored

# Deleted rows stay as tombstones until they are a fifth of the rest, then all is rebuilt.
_TOMBSTONE_SHARE = 0.2
_TOMBSTONE_LEAST = 256
_REBUILD_ROWS = 16_384
# An exhaustive search recomputes so many more than asked for, against rounding of the product.
_SLACK = 64


@dataclass(frozen=True)
class Scored:
    """What was rescored, nearest first, N rows. groups: equal where person_id is equal."""

    numbers: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]
    recall_ranks: npt.NDArray[np.int64] | None
    unmodulated_ranks: npt.NDArray[np.int64] | None
    parts: npt.NDArray[np.float32] | None
    searched: int
    exhaustive: bool
    recall_ms: float
    rescore_ms: float


@dataclass
class Counters:
    """How often each stage ran since the gallery was opened."""

    recall_calls: int = 0
    rescore_calls: int = 0


class _SharedLock:
    """Many readers or one writer; a waiting writer lets no new reader in."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._readers = 0
        self._idle = threading.Condition()

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._turn, self._idle:
            self._readers += 1
        try:
            yield
        finally:
            with self._idle:
                self._readers -= 1
                self._idle.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._turn:
            with self._idle:
                self._idle.wait_for(lambda: self._readers == 0)
            yield


@dataclass(frozen=True)
class _Rows:
    """The members that share positions, swapped together by a rebuild."""

    columns: Columns
    features: Features
    index: RecallIndex | None

    def add(self, stored: Stored) -> None:
        lifted = self.features.add(stored.features)
        if self.index is not None:
            self.index.add(lifted.numpy())
        self.columns.add(stored)


class Shard:
    """Features of one checkpoint (its `config`) on one device. Thread-safe."""

    def __init__(self, config: CMTConfig, device: str) -> None:
        self._config, self._device = config, device
        self._rows = self._empty()
        self._lock = _SharedLock()
        self._changing = threading.Lock()
        self.counters = Counters()
        self._counting = threading.Lock()

    def __len__(self) -> int:
        return self._rows.columns.alive_count

    def load(self, blocks: Iterable[Stored], count: int) -> None:
        """Fill an empty shard with about `count` items."""
        with self._changing, self._lock.alone():
            self._rows.features.reserve(count)
            for stored in blocks:
                self._rows.add(stored)

    def add(self, stored: Stored) -> None:
        with self._changing, self._lock.alone():
            self._rows.add(stored)

    def bury(self, numbers: Sequence[int]) -> list[int]:
        """Take items out of every later search → the numbers that were here."""
        with self._changing, self._lock.alone():
            return self._rows.columns.bury(numbers)

    def revive(self, numbers: Sequence[int]) -> None:
        """Take `bury` back, before any `tidy`."""
        with self._changing, self._lock.alone():
            self._rows.columns.revive(numbers)

    def tidy(self) -> None:
        """Rebuild without tombstones if they are many; searches go on, changes wait."""
        with self._changing:
            columns = self._rows.columns
            dead = len(columns) - columns.alive_count
            if dead < max(_TOMBSTONE_LEAST, _TOMBSTONE_SHARE * columns.alive_count):
                return
            rebuilt = self._rebuilt()
            with self._lock.alone():
                self._rows = rebuilt

    def search(
        self,
        x: Tensor,
        modulation: Modulation,
        shortlist: int,
        *,
        exhaustive: bool,
        filters: Filters,
        explain: bool,
    ) -> Scored:
        """One query x (P×D) with γ, β (1×D) → at least the `shortlist` nearest, or all there are.

        exhaustive: every allowed row is scored by the exact product, else FAISS makes the
        shortlist. Both ways the distances returned are recomputed directly.
        """
        with self._lock.shared():
            rows = self._rows
            started = time.perf_counter()
            allowed = rows.columns.mask(filters)
            searched = int(np.count_nonzero(allowed))
            exhaustive = exhaustive or rows.index is None
            unmodulated = Modulation.identity(1, x.shape[1]) if explain else None
            plain_ranks: npt.NDArray[np.int64] | None = None
            if exhaustive:
                found = _nearest(rows.features.score_all(x, modulation), allowed, shortlist)
                if unmodulated is not None:
                    plain = rows.features.score_all(x, unmodulated)
                    plain_ranks = _ranks_among(plain[allowed], plain[found])
            else:
                w, _ = project(x[None], modulation)
                assert rows.index is not None
                found = rows.index.search(w[0].numpy(), shortlist, allowed)
                self._count(recall=1)
            recalled = time.perf_counter()

            distances, parts = rows.features.rescore(x, modulation, found)
            self._count(rescore=1)
            if unmodulated is not None and plain_ranks is None:
                plain_distances, _ = rows.features.rescore(x, unmodulated, found)
                plain_ranks = _ranks_among(plain_distances, plain_distances)
            numbers = rows.columns.numbers[found]
            persons = rows.columns.persons[found]
            order = np.lexsort((numbers, distances))
            return Scored(
                numbers=numbers[order],
                groups=np.where(persons < 0, -1 - numbers, persons)[order],
                distances=distances[order],
                recall_ranks=None if exhaustive else order + 1,
                unmodulated_ranks=None if plain_ranks is None else plain_ranks[order],
                parts=None if parts is None else parts[order],
                searched=searched,
                exhaustive=exhaustive,
                recall_ms=1e3 * (recalled - started),
                rescore_ms=1e3 * (time.perf_counter() - recalled),
            )

    def _empty(self) -> _Rows:
        config = self._config
        features = Features(config.parts, config.dim, config.metric, self._device)
        if config.metric == "cosine":  # no single inner product: searched exhaustively only
            return _Rows(Columns(), features, None)
        return _Rows(Columns(), features, RecallIndex((config.parts + 1) * config.dim))

    def _rebuilt(self) -> _Rows:
        old = self._rows
        columns, positions = old.columns.compacted()
        rows = self._empty()
        rows.features.reserve(len(positions))
        for start in range(0, len(positions), _REBUILD_ROWS):
            block = old.features.stored(positions[start : start + _REBUILD_ROWS])
            lifted = rows.features.add(block)
            if rows.index is not None:
                rows.index.add(lifted.numpy())
        return _Rows(columns, rows.features, rows.index)

    def _count(self, *, recall: int = 0, rescore: int = 0) -> None:
        with self._counting:
            self.counters.recall_calls += recall
            self.counters.rescore_calls += rescore


def _nearest(
    scores: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_], count: int
) -> npt.NDArray[np.int64]:
    """Positions of the allowed rows with the smallest scores, `count` and some slack, unsorted."""
    positions = np.flatnonzero(allowed)
    count += _SLACK
    if count >= len(positions):
        return positions
    return positions[np.argpartition(scores[positions], count)[:count]]


def _ranks_among(
    everyone: npt.NDArray[np.floating], chosen: npt.NDArray[np.floating]
) -> npt.NDArray[np.int64]:
    """1 + how many of `everyone` are smaller than each of `chosen`."""
    return np.searchsorted(np.sort(everyone), chosen, side="left") + 1
