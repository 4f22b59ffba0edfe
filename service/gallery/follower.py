"""One model version in memory: a shard that follows the store, and its snapshot on disk.

Everything enters the shard this way, whether this process wrote it or another, so that its position
is known exactly.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from model import CheckpointInfo
from service.errors import (
    DatabaseUnavailable,
    GalleryFull,
    MemoryExhausted,
    ServiceError,
    StorageMoved,
)
from service.gallery.feed import Position, Stored, Witness
from service.gallery.index import snapshot
from service.gallery.index.figures import IndexChoice
from service.gallery.index.room import NoRoom
from service.gallery.index.shard import Presence, Shard
from service.gallery.index.snapshot import Restored, SnapshotInvalid
from service.gallery.storage.store import Store
from service.gallery.storage.streaming import View
from service.kit.device_loss import report_loss
from service.kit.memory import is_out_of_memory
from service.kit.text import counted

log = logging.getLogger(__name__)

# Fewer items are read from the store as fast as from a snapshot.
_SNAPSHOT_LEAST = 10_000
_SNAPSHOT_GROWTH = 0.05  # a snapshot is written again when this share has been added
_SNAPSHOT_SECONDS = 60.0  # between two attempts, at least
_SNAPSHOT_REST = 20  # or this many times as long as the last one took

SYNC_SECONDS = 1.0
"""How old what is searched may be where several processes share a database: an answer is never
given by an older state than the store's this long ago."""
# So old it may be before a replica refuses queries and is not ready: beyond the promise by a few
# looks that a busy machine missed. Until then a query looks itself before it is answered.
_STALE = SYNC_SECONDS + 2.0


def read_snapshot(folder: Path, info: CheckpointInfo, device: str) -> Restored | None:
    """Read the snapshot in the data folder `folder`, without the store; None if none is usable."""
    try:
        return snapshot.load(
            folder / snapshot.FOLDER, info.config, device, fingerprint=info.fingerprint
        )
    except SnapshotInvalid as reason:
        log.info("the index is built from the store: %s", reason)
        return None


class Follower:
    """The shard of one checkpoint's features, kept in step with `store`. Thread-safe.

    folder: the data folder; the snapshot is in its `index` folder. kind: see `IndexChoice`.
    restored: what `read_snapshot` gave for the same checkpoint and device. incomplete: begin also
    where memory does not hold all items; `counts` then raises MemoryExhausted.
    """

    def __init__(
        self,
        store: Store,
        info: CheckpointInfo,
        folder: Path,
        device: str,
        kind: IndexChoice,
        restored: Restored | None,
        *,
        incomplete: bool = False,
    ) -> None:
        self.store, self.info = store, info
        self._folder, self._device, self._kind = folder / snapshot.FOLDER, device, kind
        self._following = threading.Lock()
        self._behind = False  # a write of ours is committed and not yet searchable
        self.lacks_memory = False
        """Whether items are stored that memory has no room for, so that no query finds them."""
        self._saved_items: int | None = None  # in the snapshot on disk
        self._next_save = time.monotonic() + _SNAPSHOT_SECONDS
        self._snapshot_stale = False  # one is on disk that must be removed
        self._erasures = 0
        self.shard, self.position = self._new_shard(), Position(0, 0)
        if restored is not None:
            self.shard.restore(restored.segment)
            self.position, self._saved_items = restored.position, len(self.shard)
        # A position that was reached, and what the store held there: whether it still does.
        self._anchor = None if restored is None else (restored.position, restored.witness)
        self._counted = False  # which takes longer than reading a snapshot: `maintain` does it
        self._seen = time.monotonic()  # when the state began to be read that the shard is at
        try:
            with self.store.view() as view:
                self._follow(view)
        except BaseException as error:
            if incomplete and isinstance(error, MemoryExhausted):
                log.warning("the gallery opens without some of its items: %s", error.detail)
                self._behind = self.lacks_memory = True
                return
            self.shard.close()
            raise

    def close(self) -> None:
        """Stop the shard's background work; the store stays open."""
        self.shard.close()

    def with_version(self, store: Store, info: CheckpointInfo) -> Follower:
        """A follower of another version. store: as seen with that version."""
        folder = self._folder.parent
        restored = read_snapshot(folder, info, self._device)
        return Follower(store, info, folder, self._device, self._kind, restored)

    def follow(self) -> None:
        """Take over what was committed since the last call.

        Raises DatabaseUnavailable, GalleryDamaged, StorageUnwritable, or MemoryExhausted where
        there is no room for new items: what was deleted or relabelled is followed all the same.
        The next call tries again.
        """
        with self._turn():
            self._behind = False  # before the view: what is committed after it sets it again
            started = time.monotonic()
            try:
                with self.store.view() as view:
                    self._follow(view)
            except BaseException as error:
                self._behind = True
                if isinstance(error, MemoryExhausted):  # what took none was followed
                    self._seen, self.lacks_memory = started, True
                raise
            self._seen, self.lacks_memory = started, False

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for another call that follows, though not for a database that does not answer it."""
        if not self._following.acquire(timeout=_STALE if self.store.shared else -1):
            raise self._stale()
        try:
            yield
        finally:
            self._following.release()

    @property
    def lag(self) -> float:
        """Seconds since the shard was surely in step with the store; 0 where nobody else writes."""
        return time.monotonic() - self._seen if self.store.shared else 0.0

    def refuse_stale(self) -> None:
        """Raise DatabaseUnavailable where what others wrote has not been seen for too long."""
        if self.lag > _STALE:
            raise self._stale()

    def _stale(self) -> DatabaseUnavailable:
        return DatabaseUnavailable(
            f"the database does not answer in time: this replica has not followed it for "
            f"{self.lag:.0f} s, {SYNC_SECONDS:g} s is promised; ask another replica, or try again "
            "later"
        )

    @property
    def presence(self) -> Presence:
        """Of shards: this process has one."""
        return Presence(1, 1)

    @property
    def spilled(self) -> int:
        """Items that have no room on the GPU and are searched on the host; 0 without a GPU."""
        return 0 if self._device == "cpu" else self.shard.statistics().on_host

    @contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Hold memory for so many items that are stored in this context. Raises GalleryFull."""
        with ExitStack() as stack:
            try:
                if self._behind:
                    self.follow()  # what is stored already comes first
                stack.enter_context(self.shard.room_for(count))
            except (NoRoom, MemoryExhausted) as error:
                raise GalleryFull(
                    f"there is no memory to search {counted(count, 'more item')} in, so nothing is "
                    "stored; delete items, give the service more memory or stop what else uses it, "
                    "and send it again"
                ) from error
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Follow what is written in this context; if that fails, the next search tries again."""
        try:
            yield
        except (DatabaseUnavailable, StorageMoved):
            self._behind = True  # the commit may have happened and only its answer be lost
            raise
        self._behind = True
        try:
            self.follow()
        except ServiceError as error:
            log.warning("the index could not follow the store: %s", error.detail)
        except Exception as error:
            if not report_loss(error):  # with the device lost, it is on the disk all the same
                raise

    def catch_up(self, *, always: bool = False) -> None:
        """Follow this process's own writes if that failed before. Call it before a search.

        Without memory for new items the search goes on without them; nothing that was deleted is
        found, and `counts` tells. What other processes wrote is followed where the last look is
        longer ago than promised, or always. Raises as `follow`, but for MemoryExhausted, and as
        `refuse_stale`.
        """
        self.refuse_stale()
        if self._behind or always or self.lag > SYNC_SECONDS:
            with suppress(MemoryExhausted):
                self.follow()

    def maintain(self) -> None:
        """Retry what failed, and renew the snapshot. Called regularly in the background."""
        self.shard.tend()
        if self._behind or self.store.shared:
            self.follow()
        if not self._counted:
            self._count()
        if self._snapshot_stale:
            self._remove_snapshot()
        if self._snapshot_due():
            self.save()

    def counts(self) -> tuple[int, int]:
        """Items with features in the store, and in the shard, at one moment."""
        with self._following, self.store.view() as view:
            self._follow(view)
            return view.count(), len(self.shard)

    def _count(self) -> None:
        """Log items that no search finds, once after a start."""
        stored, searchable = self.counts()
        awaiting = self.store.versions.count_missing(self.info.fingerprint)
        self._counted = True
        if awaiting:
            log.warning(
                "%d items were embedded by another checkpoint; queries leave them out until they "
                "are embedded again",
                awaiting,
            )
        if stored != searchable:
            log.warning(
                "the index holds %d items, the store %d; its snapshot is removed, so that the "
                "next start builds it from the store",
                *(searchable, stored),
            )
            self._remove_snapshot()

    def save(self) -> bool:
        """Write a snapshot of this moment. False: the disk refused, or something was erased."""
        started = time.monotonic()
        self.follow()
        try:
            return self._save()
        finally:
            ended = time.monotonic()
            self._next_save = ended + max(_SNAPSHOT_SECONDS, _SNAPSHOT_REST * (ended - started))

    def _snapshot_due(self) -> bool:
        """Whether a new snapshot would speed up a start, and the last attempt is some time ago."""
        items = len(self.shard)
        if items < _SNAPSHOT_LEAST or time.monotonic() < self._next_save:
            return False
        return self._saved_items is None or items - self._saved_items > _SNAPSHOT_GROWTH * items

    def _save(self) -> bool:
        with self._following:
            frozen, position, erasures = self.shard.freeze(), self.position, self._erasures
        items = frozen.columns.alive_count
        with self.store.view() as view:
            witness = view.witness(position)
        try:
            snapshot.save(
                frozen,
                self._folder,
                fingerprint=self.info.fingerprint,
                position=position,
                witness=witness,
            )
        except OSError as error:
            if self._erasures == erasures:
                log.warning("no snapshot of the index could be written: %s", error)
            return False
        with self._following:
            if self._erasures != erasures:
                self._remove_snapshot()
                return False
            self._saved_items = items
        return True

    def _new_shard(self) -> Shard:
        return Shard(self.info.config, self._device, self._kind)

    def _leads_to(self, view: View, position: Position, witness: Witness) -> bool:
        """False where the store is another than was followed so far, or was put back.

        So it is with the snapshot of another gallery, after a restore, and after a failover to a
        server that lacks what was committed last.
        """
        now = view.witness(position)
        if (now.change, now.version) != (witness.change, witness.version):
            return False
        if now.item == witness.item:
            return True
        return now.item is None and position.item in view.changes_since(position).deleted

    def _begin_anew(self) -> None:
        """Forget what was followed. Until all is read again nothing is answered."""
        log.warning(
            "the index does not fit the store, as after a restore or a failover; it is built anew"
        )
        old, self.shard = self.shard, self._new_shard()
        old.close()
        self.position, self._anchor = Position(0, 0), None
        self._seen = min(self._seen, time.monotonic() - _STALE)
        self._note_erasure()

    def _note_erasure(self) -> None:
        self._erasures += 1
        self._saved_items = None
        self._remove_snapshot()

    def _follow(self, view: View) -> None:
        newest = view.position()
        if self._anchor is not None and not self._leads_to(view, *self._anchor):
            self._begin_anew()
        self._advance(view, newest)
        # Nobody but this process writes to SQLite's file, and it is watched by itself.
        if self.store.shared and (self._anchor is None or newest != self._anchor[0]):
            self._anchor = newest, view.witness(newest)
        self.position = newest

    def _advance(self, view: View, newest: Position) -> None:
        """Take over what the store holds beyond the position, up to `newest`."""
        if newest.change > self.position.change:
            changes = view.changes_since(self.position)
            self.shard.mark_deleted(changes.deleted)
            self._replace(changes.updated)
            self.position = Position(self.position.item, newest.change)
            self._note_erasure()
        if newest.item > self.position.item:
            with self._memory():  # first: without any, reading them is in vain
                self.shard.make_room()
            # The position advances with every block: if the next one fails, none is added twice.
            blocks = view.stream(self.position.item)
            with closing(blocks), self.shard.filling():
                for stored in blocks:
                    with self._memory():
                        self.shard.add(stored)
                    self.position = Position(stored.numbers[-1], newest.change)

    def _replace(self, stored: Stored) -> None:
        # First what takes no memory, so that a lack of it leaves no old label.
        self.shard.update(
            stored.numbers,
            persons=stored.persons,
            cameras=stored.cameras,
            captured=stored.captured,
        )
        lacking = set(self.shard.lacking(stored.numbers))
        late = [row for row, number in enumerate(stored.numbers) if number in lacking]
        if late:
            with self._memory():
                self.shard.add(_rows(stored, late))

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Items are added in this context. Raises MemoryExhausted where there is no room."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryExhausted(
                f"the index has no memory for more than {counted(len(self.shard), 'item')}; more "
                "are stored, which no query finds until there is; free memory, or restart on a "
                "larger host"
            ) from error

    def _remove_snapshot(self) -> None:
        """Leave nothing that was erased in a file; `maintain` retries where this fails."""
        try:
            snapshot.remove(self._folder)
            self._snapshot_stale = False
        except OSError as error:
            if not self._snapshot_stale:
                log.warning("an old snapshot of the index cannot be removed yet: %s", error)
            self._snapshot_stale = True


def _rows(stored: Stored, rows: Sequence[int]) -> Stored:
    return Stored(
        numbers=[stored.numbers[row] for row in rows],
        persons=[stored.persons[row] for row in rows],
        cameras=[stored.cameras[row] for row in rows],
        modalities=[stored.modalities[row] for row in rows],
        captured=[stored.captured[row] for row in rows],
        features=stored.features[rows],
    )
