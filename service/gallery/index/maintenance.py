"""A shard's background work: compaction and index building, while searches and changes continue."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt

from service.gallery.index.byte_codes import code_bytes, levels
from service.gallery.index.faiss_module import halve_threads
from service.gallery.index.features import Features
from service.gallery.index.figures import Figures, IndexChoice
from service.gallery.index.recall_index import MEMORY_SHARE, choose_kind
from service.gallery.index.room import NoRoom, device_room, host_room
from service.gallery.index.segment import (
    Rewriting,
    Segment,
    Stopped,
    build_index,
    extend_codes,
    extend_index,
    move_up,
    next_run,
)
from service.gallery.records import IndexKind
from service.kit.device_loss import report_loss
from service.kit.host_memory import available_memory
from service.kit.memory import is_out_of_memory

log = logging.getLogger(__name__)

# Deleted rows stay as tombstones until they are a fifth of the rest; then they are left out, in as
# few steps as there is memory for.
_TOMBSTONE_SHARE = 0.2
_TOMBSTONE_LEAST = 256
# Later rows are added to an index when they are a tenth of its own; until then they are scanned.
_TAIL_SHARE = 0.1
_TAIL_LEAST = 1024
# An index of lists is trained again when the gallery has grown this many times.
_RETRAIN_GROWTH = 4
INDEX_LEAST = 1000  # fewer rows are too few to train on
_COPY_SHARE = 0.5  # of the memory that is free, which copies of a step may take
# Until work for which there was no memory is tried again: twice as long each time, up to so long.
_RETRY_SECONDS, _RETRY_MOST = 5.0, 60.0


class Maintenance:
    """Holds the segment and replaces it. Callers that change the segment hold `changing`.

    A thread runs while there is work and ends with it. kind: forces one, or says by which figures
    `choose_kind` chooses.
    """

    def __init__(self, segment: Segment, kind: IndexChoice) -> None:
        self.segment = segment
        self.changing = threading.Lock()
        self.rebuilds = 0
        self._kind = None if isinstance(kind, Figures) else kind
        self._figures = kind if isinstance(kind, Figures) else None
        self._touched: set[int] | None = None  # changed during a compaction
        self._worker: threading.Thread | None = None
        self._closing = False
        self._filling = False
        self._failed = False
        self._tries = 0  # for which there was no memory
        self._retry_at = 0.0
        self._expected = 0  # rows that are going to be added

    def expect(self, count: int) -> None:
        """Take memory for rows that are going to be added. Raises NoRoom. Call it as `touch`."""
        self.segment.features.make_room(self._expected + count)
        self._expected += count

    def forget(self, count: int) -> None:
        """The rows that were expected are there, or do not come."""
        self._expected -= count

    def touch(self, numbers: Sequence[int]) -> None:
        """Note that items changed. Call this and `wake` with `changing` held."""
        if self._touched is not None:
            self._touched.update(numbers)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Much is added in this context: begin no work before its end, which it would slow down."""
        self._filling = True
        try:
            yield
        finally:
            self._filling = False
            with self.changing:
                self.wake()

    def wake(self) -> None:
        """Start the background thread if there is work for it."""
        if self._filling or self._closing:
            return
        if self._worker is None and self._due() is not None:
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
        halve_threads()
        while True:
            with self.changing:
                due = None if self._closing else self._due()
                if due is None:
                    self._worker = None
                    return
            try:
                self._do(due)
                self._tries = 0
            except Stopped:
                pass
            except Exception as error:
                if is_out_of_memory(error):
                    if not self._tries:
                        log.warning("no memory yet for upkeep of the index (%s): %s", due, error)
                    wait = min(_RETRY_SECONDS * 2**self._tries, _RETRY_MOST)
                    self._tries, self._retry_at = self._tries + 1, time.monotonic() + wait
                    continue
                # The service continues by scanning; what failed is tried again after a restart.
                if not report_loss(error):
                    log.exception(
                        "background work on the gallery's index failed; all rows are scanned"
                    )
                self._failed = True
            finally:
                self._touched = None

    def _do(self, due: str) -> None:
        if due == "compact":
            self._compact()
        elif due == "move up":
            features = self.segment.features
            if (run := features.run_on_host()) is not None:
                move_up(features, run, self.changing, self._stop)
        elif due == "code":
            extend_codes(self.segment.features, len(self.segment.columns), self._stop)
        else:
            self._index(due)

    def _due(self) -> str | None:
        """The next work: "compact", "move up", a kind of index to build or extend, "code"; None."""
        segment = self.segment
        columns, index = segment.columns, segment.index
        dead = len(columns) - columns.alive_count
        if self._failed or time.monotonic() < self._retry_at:
            return None
        if dead >= max(_TOMBSTONE_LEAST, _TOMBSTONE_SHARE * columns.alive_count):
            return "compact"
        if segment.features.run_on_host() is not None:
            return "move up"
        kind = self._wanted(segment)
        if kind != "SQfp16":
            if index is None or index.kind != kind or self._outgrown(segment):
                return kind
            if len(columns) - len(index) >= max(_TAIL_LEAST, _TAIL_SHARE * len(index)):
                return kind
        return "code" if self._uncoded(segment) else None

    def _uncoded(self, segment: Segment) -> bool:
        """Whether rows are to be coded, for which there is memory."""
        features = segment.features
        coded = 0 if features.codes is None else len(features.codes)
        tail = len(segment.columns) - coded
        if tail < _TAIL_LEAST or features.metric == "cosine" or features.device.type != "cpu":
            return False
        fits = code_bytes(tail, features.width) <= MEMORY_SHARE * max(0, host_room())
        return fits and levels(features.width) > 0

    def _wanted(self, segment: Segment) -> IndexKind:
        features, count = segment.features, len(segment.columns)
        if features.metric == "cosine" or count < INDEX_LEAST:
            return "SQfp16"
        if self._kind is not None:
            return self._kind
        if segment.index is not None:
            return segment.index.kind  # a gallery at the threshold does not switch back and forth
        device = features.device
        room = available_memory if device.type == "cpu" else partial(device_room, device)
        return choose_kind(count, device.type, room, features.width, self._figures)

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
        if index is None or index.kind != kind or self._outgrown(segment) or not index.extendable:
            segment.index = build_index(segment, kind, self._stop)  # type: ignore[arg-type]
            self.rebuilds += 1
        else:
            extend_index(index, segment.features, len(segment.columns), self._stop)

    def _compact(self) -> None:
        """Leave out deleted rows, run after run of chunks. Raises NoRoom where some must wait."""
        start, waiting = 0, ""
        while True:
            with self.changing:
                old, self._touched = self.segment, set()
                alive = old.columns.alive.copy()
            room = int(_COPY_SHARE * _room(old.features))
            run = next_run(old.features, alive, start, room)
            if run is None:
                break
            # An index knows rows by position: where more steps follow, it is built after them.
            only = start == 0 and next_run(old.features, alive, run.stop, room) is None
            try:
                start = run.start + self._rewrite(old, run, alive, indexed=only)
            except NoRoom as error:  # others may be wholly deleted, and need none
                start, waiting = run.start + 1, str(error)
        if waiting:
            raise NoRoom(waiting)

    def _rewrite(
        self, old: Segment, run: slice, alive: npt.NDArray[np.bool_], *, indexed: bool
    ) -> int:
        """Copy what is alive of some chunks, and swap → how many chunks that made."""
        rewriting = Rewriting(old, run, alive)
        new = rewriting.copy(self._stop)
        kind = self._wanted(new) if indexed else "SQfp16"
        index = None if kind == "SQfp16" else build_index(new, kind, self._stop)
        if self._closing:
            raise Stopped
        with self.changing:
            new = rewriting.finish(list(self._touched or ()))
            new.index = index
            self.segment = new
            self.rebuilds += 1
        return len(rewriting.made)

    def _stop(self) -> bool:
        return self._closing


def _room(features: Features) -> int:
    """Bytes for copies of features, wherever they go."""
    there = 0 if features.device.type == "cpu" else device_room(features.device)
    return max(0, there) + max(0, host_room())
