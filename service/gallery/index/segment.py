"""What a shard holds in memory: members that share positions, and the work that keeps them small.

Everything here is called by one thread at a time; others may read concurrently.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from model import CMTConfig
from service.gallery.feed import Stored
from service.gallery.index.byte_codes import SAMPLE, ByteCodes
from service.gallery.index.chunks import Chunk
from service.gallery.index.columns import Columns
from service.gallery.index.features import Features
from service.gallery.index.gpu_index import make_index
from service.gallery.index.recall_index import RecallIndex, training_rows
from service.gallery.index.room import NoRoom, feature_bytes
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

    @property
    def on_host(self) -> int:
        """Living rows in the host's memory."""
        alive = self.columns.alive
        return sum(
            int(np.count_nonzero(alive[chunk.first : chunk.first + chunk.count]))
            for chunk in self.features.chunks
            if chunk.device.type == "cpu"
        )


class Rewriting:
    """Copies a run of a segment's chunks without its deleted rows, while the segment is in use.

    run: which chunks. alive: by position, at the moment when it begins. Call `copy`, then `finish`
    while nothing changes. Searches go on with the segment that they began with.
    """

    def __init__(self, old: Segment, run: slice, alive: npt.NDArray[np.bool_]) -> None:
        self._old, self._run = old, run
        self._chunks = old.features.chunks[run]
        self._until = len(alive)
        kept = alive.copy()
        kept[: self._chunks[0].first] = True
        kept[self._end(self._chunks[-1]) :] = True
        self._kept = np.flatnonzero(kept)
        self._rows = [
            np.flatnonzero(alive[chunk.first : self._end(chunk)]) for chunk in self._chunks
        ]
        self._columns = Columns()
        self.made: list[Chunk] = []

    def copy(self, stop: Stop) -> Segment:
        """Copy → the new segment, which lacks what came meanwhile. Raises NoRoom and Stopped."""
        for place, rows in enumerate(self._rows):
            for block in _blocks(rows):
                if stop():
                    raise Stopped
                self._append(place, block)
        for block in _blocks(self._kept):
            if stop():
                raise Stopped
            self._columns.extend(self._old.columns, block)
        return self._segment()

    def finish(self, touched: Sequence[int]) -> Segment:
        """The new segment with what came meanwhile, and `touched` as it is now. Raises NoRoom."""
        place = len(self._chunks) - 1
        last = self._chunks[place]
        self._append(place, np.arange(self._end(last) - last.first, last.count))
        late = np.arange(self._until, len(self._old.columns))
        self._columns.extend(self._old.columns, late)
        self._columns.align(self._old.columns, touched)
        return self._segment()

    def _end(self, chunk: Chunk) -> int:
        """Where its rows ended at the beginning."""
        return min(chunk.first + chunk.count, self._until)

    def _segment(self) -> Segment:
        features = self._old.features.replaced(self._run.start, self._run.stop, self.made)
        return Segment(features, self._columns)

    def _append(self, place: int, local: npt.NDArray[np.int64]) -> None:
        """Copy rows of a chunk to the end of what is made."""
        chunk = self._chunks[place]
        while len(local):
            if not self.made or not self.made[-1].room or self.made[-1].scale != chunk.scale:
                wanted = self._wanted(place, len(local))
                self.made.append(self._old.features.new_chunk(chunk.scale, wanted))
            to = self.made[-1]
            part = local[: to.room]
            chunk.take(part, to.z[to.count : to.count + len(part)])
            to.count += len(part)
            local = local[len(part) :]

    def _wanted(self, place: int, left: int) -> int | None:
        """Rows for the next chunk: those that follow; as many as usual where others are added."""
        if self._run.stop == len(self._old.features.chunks):
            return None
        alike = takewhile(
            lambda chunk: chunk.scale == self._chunks[place].scale, self._chunks[place + 1 :]
        )
        return left + sum(
            len(rows) for _, rows in zip(alike, self._rows[place + 1 :], strict=False)
        )


def move_up(features: Features, run: slice, changing: threading.Lock, stop: Stop) -> None:
    """Copy chunks of the host to one on the device, and use that. Raises NoRoom and Stopped."""
    chunks = features.chunks[run]
    made = features.new_chunk_on_device(chunks[0].scale, sum(chunk.capacity for chunk in chunks))
    if made is None:
        raise NoRoom("the GPU has no memory for more features")
    made.first = chunks[0].first

    def copy(chunk: Chunk, start: int) -> None:
        at = chunk.first - made.first
        for block in _blocks(np.arange(start, chunk.count)):
            if stop():
                raise Stopped
            rows = slice(at + int(block[0]), at + int(block[-1]) + 1)
            chunk.take(block, made.z[rows])

    done = 0
    for chunk in chunks:
        done = chunk.count
        copy(chunk, 0)
    with changing:
        copy(chunks[-1], done)
        made.count = chunks[-1].first + chunks[-1].count - made.first
        if features.chunks[run] == chunks:
            features.chunks = (*features.chunks[: run.start], made, *features.chunks[run.stop :])


def next_run(
    features: Features, alive: npt.NDArray[np.bool_], start: int, room: int
) -> slice | None:
    """From the chunk `start` on: those with deleted rows whose living ones fit into `room` bytes.

    At least one chunk; None where no row is deleted.
    """
    counts = [
        int(np.count_nonzero(alive[chunk.first : chunk.first + chunk.count]))
        for chunk in features.chunks
    ]
    dead = [
        min(chunk.count, len(alive) - chunk.first) > count
        for chunk, count in zip(features.chunks, counts, strict=True)
    ]
    if True not in dead[start:]:
        return None
    first = dead.index(True, start)
    stop, bytes_needed = first, 0
    for place in range(first, len(dead)):
        bytes_needed += feature_bytes(counts[place], features.width)
        if place > first and bytes_needed > room:
            break
        if dead[place]:
            stop = place + 1
    return slice(first, stop)


def build_index(segment: Segment, kind: IndexKind, stop: Stop) -> RecallIndex:
    """An index of all rows present at the start, trained on a sample. Raises Stopped."""
    features, count = segment.features, len(segment.columns)
    index = make_index(features.width, kind, count, features.device, features.dim)
    wanted = training_rows(kind, count)
    if wanted:
        sample = np.random.default_rng(0).choice(count, wanted, replace=False)
        index.train(features.lifted(np.sort(sample)))
    extend_index(index, features, count, stop)
    return index


def extend_codes(features: Features, count: int, stop: Stop) -> None:
    """Code the rows up to `count` that have no codes, while they are searched. Raises Stopped."""
    codes = features.codes
    if codes is None:
        sample = np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64)
        codes = ByteCodes(features.lifted(sample), features.dim)
    for block in _blocks(np.arange(len(codes), count)):
        if stop():
            raise Stopped
        codes.add(features.lifted(block))
        features.codes = codes


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
