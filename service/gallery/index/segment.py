"""What a shard holds in memory: members that share positions, and the work that keeps them small.

Everything here is called by one thread at a time; others may read concurrently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model import CMTConfig
from service.gallery.feed import Stored
from service.gallery.index.columns import Columns
from service.gallery.index.features import Features
from service.gallery.index.recall_index import RecallIndex, training_rows
from service.gallery.records import IndexKind

_BLOCK_ROWS = 4096

Stop = Callable[[], bool]


class Stopped(Exception):  # noqa: N818
    """The shard is closing; the work is abandoned."""


@dataclass
class Segment:
    """Features, filter columns and, if one is built, a FAISS index of the first rows."""

    features: Features
    columns: Columns
    index: RecallIndex | None = None

    @classmethod
    def empty(cls, config: CMTConfig, device: str) -> Segment:
        """A segment without rows, for features of this configuration."""
        return cls(Features(config.parts, config.dim, config.metric, device), Columns())

    def add(self, stored: Stored) -> None:
        """Append a block of items, all or none."""
        # The columns last: they determine how many rows a reader sees.
        try:
            self.features.add(stored.features)
            self.columns.add(stored)
        except BaseException:
            self.features.truncate(len(self.columns))
            raise

    def extend(self, other: Segment, positions: npt.NDArray[np.int64]) -> None:
        """Append rows of the segment that this one was forked from."""
        for block in _blocks(positions):
            self.features.add(other.features.stored(block))
            self.columns.extend(other.columns, block)

    def fork(self) -> Segment:
        """An empty segment of the same shape."""
        mine = self.features
        device = str(mine.device)
        features = Features(mine.parts, mine.dim, mine.metric, device)
        return Segment(features, Columns())


def build_index(segment: Segment, kind: IndexKind, stop: Stop) -> RecallIndex:
    """An index of all rows present at the start, trained on a sample. Raises Stopped."""
    features, count = segment.features, len(segment.columns)
    index = RecallIndex(features.width, kind, count)
    wanted = training_rows(kind, count)
    if wanted:
        sample = np.random.default_rng(0).choice(count, wanted, replace=False)
        index.train(features.lifted(np.sort(sample)))
    extend_index(index, features, count, stop)
    return index


def extend_index(index: RecallIndex, features: Features, count: int, stop: Stop) -> None:
    """Add the rows up to `count` that an index does not have, while it is searched.

    Raises Stopped.
    """
    for block in _blocks(np.arange(len(index), count)):
        if stop():
            raise Stopped
        index.add(features.lifted(block))


def _blocks(positions: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    for start in range(0, len(positions), _BLOCK_ROWS):
        yield positions[start : start + _BLOCK_ROWS]
