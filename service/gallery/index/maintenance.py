"""A shard's background work: compaction and index building, while searches and changes continue."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from service.gallery.index.recall_index import choose_kind
from service.gallery.index.segment import Segment, Stopped, build_index, extend_index
from service.gallery.records import IndexKind

log = logging.getLogger(__name__)

# Deleted rows stay as tombstones until they are a fifth of the rest; then all is rebuilt.
_TOMBSTONE_SHARE = 0.2
_TOMBSTONE_LEAST = 256
# Later rows are added to an index when they are a tenth of its own; until then they are scanned.
_TAIL_SHARE = 0.1
_TAIL_LEAST = 1024
# An index of lists is trained again when the gallery has grown this many times.
_RETRAIN_GROWTH = 4
INDEX_LEAST = 1000  # fewer rows are too few to train on
_CATCH_UP_ROWS = 1024  # added during a compaction, and copied while changes wait


class Maintenance:
    """Holds the segment and replaces it. Callers that change the segment hold `changing`.

    A thread runs while there is work and ends with it. kind: None lets `choose_kind` choose.
    """

    def __init__(self, segment: Segment, kind: IndexKind | None) -> None:
        self.segment = segment
        self.changing = threading.Lock()
        self.rebuilds = 0
        self._kind = kind
        self._touched: set[int] | None = None  # changed during a compaction
        self._worker: threading.Thread | None = None
        self._closing = False
        self._failed = False

    def touch(self, numbers: Sequence[int]) -> None:
        """Note that items changed. Call this and `wake` with `changing` held."""
        if self._touched is not None:
            self._touched.update(numbers)

    def wake(self) -> None:
        """Start the background thread if there is work for it."""
        if self._worker is None and not self._closing and self._due() is not None:
            self._worker = threading.Thread(
                target=self._work, name="gallery maintenance", daemon=True
            )
            self._worker.start()

    def wait(self) -> None:
        """Wait until no work is left."""
        while (worker := self._worker) is not None:
            worker.join()

    def close(self) -> None:
        """Stop the background thread, abandoning its work, and wait for its end."""
        with self.changing:
            self._closing = True
        self.wait()

    def _work(self) -> None:
        faiss.omp_set_num_threads(max(1, faiss.omp_get_max_threads() // 2))  # of this thread only
        while True:
            with self.changing:
                due = None if self._closing else self._due()
                if due is None:
                    self._worker = None
                    return
            try:
                self._compact() if due == "compact" else self._index(due)
            except Stopped:
                pass
            except Exception:
                # The service continues by scanning; what failed is tried again after a restart.
                log.exception("background work on the gallery's index failed; all rows are scanned")
                self._failed = True
            finally:
                self._touched = None

    def _due(self) -> str | None:
        """The next work: "compact", a kind of index to build or extend, or None."""
        segment = self.segment
        columns, index = segment.columns, segment.index
        dead = len(columns) - columns.alive_count
        if self._failed:
            return None
        if dead >= max(_TOMBSTONE_LEAST, _TOMBSTONE_SHARE * columns.alive_count):
            return "compact"
        kind = self._wanted(segment)
        if kind == "SQfp16":
            return None
        if index is None or index.kind != kind or self._outgrown(segment):
            return kind
        tail = len(columns) - len(index)
        return kind if tail >= max(_TAIL_LEAST, _TAIL_SHARE * len(index)) else None

    def _wanted(self, segment: Segment) -> IndexKind:
        features, count = segment.features, len(segment.columns)
        if features.metric == "cosine" or count < INDEX_LEAST:
            return "SQfp16"
        if self._kind is not None:
            return self._kind
        if segment.index is not None:
            return segment.index.kind  # a gallery at the threshold does not switch back and forth
        return choose_kind(count, features.device.type, free_memory(), features.width)

    def _outgrown(self, segment: Segment) -> bool:
        index = segment.index
        return (
            index is not None
            and index.lists > 0
            and len(segment.columns) > _RETRAIN_GROWTH * index.expected
        )

    def _index(self, kind: str) -> None:
        segment = self.segment
        index = segment.index
        if index is None or index.kind != kind or self._outgrown(segment):
            segment.index = build_index(segment, kind, self._stop)  # type: ignore[arg-type]
            self.rebuilds += 1
        else:
            extend_index(index, segment.features, len(segment.columns), self._stop)

    def _compact(self) -> None:
        """Copy what is alive, catch up with what changed meanwhile, and swap."""
        with self.changing:
            old, self._touched = self.segment, set()
            kept = np.flatnonzero(old.columns.alive)
            done = len(old.columns)
        new = old.fork()
        for start in range(0, len(kept), _CATCH_UP_ROWS):
            self._give_up()
            new.extend(old, kept[start : start + _CATCH_UP_ROWS])
        kind = self._wanted(new)
        if kind != "SQfp16":
            new.index = build_index(new, kind, self._stop)
        while True:
            self._give_up()
            with self.changing:
                end = len(old.columns)
                if end - done <= _CATCH_UP_ROWS:
                    new.extend(old, np.arange(done, end))
                    new.columns.align(old.columns, list(self._touched))
                    self.segment = new
                    self.rebuilds += 1
                    return
            new.extend(old, np.arange(done, end))
            done = end

    def _stop(self) -> bool:
        return self._closing

    def _give_up(self) -> None:
        if self._closing:
            raise Stopped


def free_memory() -> int:
    """Available memory of the machine in bytes; 2⁶² where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return 1 << 62
