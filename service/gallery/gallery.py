"""The gallery: the store is the truth, a shard its copy in memory, which follows it."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from model import CheckpointInfo, Modulation
from service.errors import (
    ClockWrong,
    DatabaseUnavailable,
    IdempotencyConflict,
    IndexOutOfStep,
    ModelVersionConflict,
    ServiceError,
    StorageMoved,
    StorageUnwritable,
)
from service.gallery.backup.backup import Backup, Backups
from service.gallery.backup.temporary_copy import remove_leftovers
from service.gallery.follower import Follower, read_snapshot
from service.gallery.index.figures import IndexChoice
from service.gallery.index.shard import Counters, Presence, Statistics
from service.gallery.records import (
    AuditPage,
    Camera,
    Erasure,
    Filters,
    Item,
    ItemUpdate,
    ModelVersion,
    NewItem,
    Page,
    RequestKey,
    SearchResult,
)
from service.gallery.reembedding import (
    Decode,
    Embed,
    Progress,
    Reembedding,
    decode_here,
    known_to_all,
)
from service.gallery.search import Options, Query, answers
from service.gallery.storage.audit import Act
from service.gallery.storage.crops import INLINE_BYTES
from service.gallery.storage.database import address_of
from service.gallery.storage.folder_lock import FolderLock
from service.gallery.storage.private_files import tighten
from service.gallery.storage.replicas import Replicas, Run
from service.gallery.storage.store import LabelField, Store, unknown_item
from service.gallery.times import utc_now
from service.kit.device_loss import report_loss
from service.kit.precedence import turn
from service.kit.shared_lock import SharedLock

log = logging.getLogger(__name__)

DEFAULT_CANDIDATES = 256
_KEEP_SECONDS = 1.0  # between two rounds of background work
_EXPIRED_AT_ONCE = 500  # items per transaction, so that enrollments wait briefly
_TRIES = 8  # switches tried again because another process enrolled in between


Follow = Callable[[Store, CheckpointInfo, Path], Follower]


class Gallery:
    """Enrolled crops of one data folder, searched with the features of one checkpoint.

    Usable without HTTP, from several threads. `awaiting` counts items whose features come from
    another checkpoint: they are kept and listed, but no query returns them until they are
    embedded again (`reembed`), because features of two checkpoints cannot be compared.
    """

    def __init__(
        self,
        lock: FolderLock,
        follower: Follower,
        folder: Path,
        candidates: int,
        replicas: Replicas | None,
    ) -> None:
        self._lock, self._current = lock, follower
        self._folder, self._candidates = folder, candidates
        store = follower.store
        self._backing_up = Backups(store.database, store.audit, store.crops, folder)
        self._enrolling = SharedLock()  # held alone while the checkpoint is changed
        self._reembedding = threading.Lock()
        self._building: str | None = None  # fingerprint that is embedded with now
        self._closing = threading.Event()
        self.replicas = replicas
        """This process among those on the database; None on SQLite, which nobody shares."""
        if replicas is not None:
            replicas.start(self._follow_others, store.database)
        self._keeper = threading.Thread(target=self._keep, name="gallery keeper", daemon=True)
        self._keeper.start()

    @classmethod
    def open(
        cls,
        data_dir: Path,
        info: CheckpointInfo,
        *,
        device: str = "cpu",
        database_url: str | None = None,
        candidates: int = DEFAULT_CANDIDATES,
        index: IndexChoice = None,
        clock_confirmed: date | None = None,
        read_clock: Callable[[], datetime] = utc_now,
        crops_url: str | None = None,
        crops_inline_bytes: int = INLINE_BYTES,
        follow: Follow | None = None,
    ) -> Gallery:
        """Open or create the gallery in `data_dir`.

        Its index is read from the folder's snapshot and follows the store from there; without one
        that fits it is built from the store. device: "cpu" or "cuda", where the features live.
        index: forces a kind of recall index, or has the figures of a GPU that one is chosen by;
        None takes what measures best for the size.
        clock_confirmed, read_clock: what `retain` goes by, see `service.gallery.storage.clock`.
        crops_url, crops_inline_bytes: an object storage, and up to which size crops are in the
        database all the same, see `service.gallery.storage.objects`.
        follow: what follows the store in place of a shard in this process, see `service.scale`.
        Raises a ServiceError, one sentence: GalleryLocked, GalleryVersion (newer schema),
        GalleryDamaged, DatabaseUnavailable, StorageUnwritable, StorageFull, CropsUnavailable.
        """
        folder = Path(data_dir)
        lock = FolderLock(folder)
        replicas: Replicas | None = None
        try:
            tighten(folder)
            remove_leftovers(folder)
            config = info.config
            if address_of(folder, database_url).get_backend_name() == "postgresql":
                assert database_url is not None
                replicas = Replicas(folder, database_url, info.fingerprint)
            with ThreadPoolExecutor(1) as beside:
                reading = None
                if follow is None:
                    reading = beside.submit(read_snapshot, folder, info, device)
                store = Store(
                    *(folder, info.fingerprint, config.embedding_size, database_url),
                    configuration=config.model_dump(mode="json"),
                    lock=lock,
                    confirmed=clock_confirmed,
                    read_clock=read_clock,
                    crops_url=crops_url,
                    crops_inline_bytes=crops_inline_bytes,
                )
            try:
                restored = None if reading is None else reading.result()
                follower = (
                    Follower(store, info, folder, device, index, restored, incomplete=True)
                    if follow is None
                    else follow(store, info, folder)
                )
            except BaseException:
                store.close()
                raise
        except BaseException:
            if replicas is not None:
                replicas.close()
            lock.release()
            raise
        return cls(lock, follower, folder, candidates, replicas)

    @property
    def model(self) -> str:
        """Fingerprint of the checkpoint whose features are searched."""
        return self._follower.info.fingerprint

    @property
    def versions(self) -> list[ModelVersion]:
        """All checkpoints that the store has features of, oldest first."""
        return self._store.versions.list()

    @property
    def awaiting(self) -> int:
        """Items that no query returns until they are embedded again."""
        return self._store.versions.count_missing(self.model)

    @property
    def counters(self) -> Counters:
        """How often recall and rescoring ran."""
        return self._follower.shard.counters

    @property
    def statistics(self) -> Statistics:
        """Sizes of the index in memory, and its kind."""
        return self._follower.shard.statistics()

    @property
    def presence(self) -> Presence:
        """How many shards of the gallery answer, and how many there are."""
        return self._follower.presence

    @property
    def lacks_memory(self) -> bool:
        """Whether items are stored that memory has no room for, so that no query finds them."""
        return self._follower.lacks_memory

    @property
    def spilled(self) -> int:
        """Items that have no room on the GPU and are searched on the host; 0 without a GPU."""
        return self._follower.spilled

    @property
    def crops_available(self) -> bool | None:
        """Whether the object storage of the crops answers; None without one."""
        return self._store.crops.available

    @property
    def pending_objects(self) -> int:
        """Objects that the object storage is still to delete, as of some seconds ago."""
        return self._store.crops.pending

    def __len__(self) -> int:
        """Items of any checkpoint."""
        return self._store.count()

    def close(self) -> None:
        """Close the store and release the folder. A second call does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self.replicas is not None:
            self.replicas.close()
        self._keeper.join()
        with self._reembedding, self._enrolling.alone():  # operations in progress end first
            self._current.close()
        self._backing_up.close()
        self._current.store.close()
        self._lock.release()

    def add(
        self, new: Sequence[NewItem], features: Tensor, *, model: str | None = None
    ) -> list[Item]:
        """Enroll items with their features (B×P×D): durable, and found by the next query.

        All or none. model: fingerprint of the checkpoint that made the features, where it may
        have been changed since. Raises StorageFull where there is no space, GalleryFull where there
        is no memory to search them in, ModelVersionConflict for features of another checkpoint,
        LabelError (`model.labels`), and ValueError for features of another shape or not finite in
        fp16.
        """
        with self._enrolling.shared():
            follower = self._of(model)
            config = follower.info.config
            expected = (len(new), config.parts, config.dim)
            if tuple(features.shape) != expected:
                raise ValueError(
                    f"features of shape {tuple(features.shape)} for {len(new)} items; "
                    f"this gallery needs {expected}"
                )
            rows = features.detach().flatten(1).half().cpu().numpy()
            with follower.room_for(len(new)), follower.writing():
                added = follower.store.add(new, rows)
        return [item for _, item in added]

    def get(self, item_id: str) -> Item:
        """The item with this id. Raises ItemNotFound."""
        return self._store.get(item_id)

    def enrolled_by(self, request: RequestKey) -> Item | None:
        """The item that an equal request enrolled before. Raises IdempotencyConflict."""
        return self._store.enrolled_by(request)

    def enrolled_by_each(
        self, requests: Sequence[RequestKey]
    ) -> Mapping[str, Item | IdempotencyConflict]:
        """The same for requests of different keys, by key: an error stands for itself."""
        return self._store.enrolled_by_each(requests)

    def image(self, item_id: str) -> tuple[bytes, str]:
        """The stored crop and its media type.

        Raises ItemNotFound, CropsUnavailable, and GalleryDamaged for one that is not as it was
        stored.
        """
        return self._store.image(item_id)

    def label(self, field: LabelField, text: str) -> str:
        """`text` as a label of `model.labels`, for a filter or an erasure.

        Raises LabelError for what is none, unless an item of an older release has it. Methods here
        that take filters or a person accept any text, which then matches nothing.
        """
        return self._store.label(field, text)

    def cameras(self) -> Sequence[Camera]:
        """What is known of the cameras, by id."""
        return self._store.cameras.list()

    def find_cameras(self, camera_ids: Collection[str]) -> Mapping[str, Camera]:
        """What is known of these cameras, by id; those of which nothing is are missing."""
        return self._store.cameras.find(camera_ids)

    def put_camera(self, camera: Camera, *, actor: str = "system") -> Camera:
        """Store what holds for a camera, in place of what did. Raises LabelError."""
        return self._store.cameras.put(camera, actor=actor)

    def delete_camera(self, camera_id: str, *, actor: str = "system") -> bool:
        """Forget what holds for a camera; its items stay. False: nothing was known of it."""
        return self._store.cameras.delete(camera_id, actor=actor)

    def list(self, filters: Filters, limit: int, cursor: str | None = None) -> Page:
        """Items in order of enrollment. Raises CursorInvalid."""
        return self._store.list(filters, limit, cursor)

    def update(self, item_id: str, changed: ItemUpdate, *, actor: str = "system") -> Item:
        """Give an item other labels or metadata; the next query filters by them.

        actor: who did it, for the audit log, here and below. Raises ItemNotFound and LabelError.
        """
        with self._changing() as store:
            return store.update(item_id, changed, actor=actor)

    def delete(self, item_id: str, *, actor: str = "system") -> int:
        """Erase an item: once this returns, no query finds it. Raises ItemNotFound.

        Returns how many objects of it the object storage still has (`Erasure.pending`).
        """
        number = self._store.number_of(item_id)
        with self._changing() as store:
            deleted = store.delete([number], actor=actor)
        if not deleted:  # another call was first
            raise unknown_item(item_id)
        return self._store.crops.finish([number])

    def delete_where(self, person_id: str, *, actor: str = "system") -> int:
        """Erase a person's items → how many."""
        return self.erase(person_id, actor=actor).items

    def erase(self, person_id: str, *, actor: str = "system") -> Erasure:
        """Erase a person's items → how many, and what is still to be done."""
        with self._changing() as store:
            numbers = store.erase_person(person_id, actor=actor)
        return Erasure(len(numbers), self._store.crops.finish(numbers))

    def retain(self, days: float | None) -> int:
        """Erase what was enrolled more than so many days ago → how many; None: nothing.

        Raises ClockWrong, and erases nothing, while the machine's clock cannot be believed. Call it
        regularly, also with None: only so the gallery learns how far it can be.
        """
        differ = None if self.replicas is None else self.replicas.clocks_differ()
        if differ is not None:  # first: what it shows must not be remembered either
            raise ClockWrong(f"{differ}; until then nothing is deleted by age")
        now = self._store.clock.observe()
        return 0 if days is None else self.expire(now - timedelta(days=days))

    def expire(self, before: datetime, *, actor: str = "retention") -> int:
        """Erase the items that were surely enrolled before this moment → how many."""
        gone = 0
        while numbers := self._store.numbers_before(before, _EXPIRED_AT_ONCE):
            with self._changing() as store:
                gone += store.delete(numbers, actor=actor)
        return gone

    def record(self, *acts: Act) -> None:
        """Write acts that the gallery cannot see itself into the audit log, durably."""
        self._store.audit.append(*acts)

    def audit(self, limit: int, cursor: str | None = None) -> AuditPage:
        """Entries of the audit log, newest first. Raises CursorInvalid."""
        return self._store.audit.page(limit, cursor)

    def search(
        self,
        x: Tensor,
        modulation: Modulation | None,
        *,
        top_k: int,
        candidates: int | None = None,
        exhaustive: bool = False,
        filters: Filters | None = None,
        group_by: str | None = None,
        explain: bool = False,
        max_distance: float | None = None,
        model: str | None = None,
    ) -> SearchResult:
        """`search_all` for one query with these `Options`."""
        options = Options(
            top_k=top_k,
            candidates=candidates,
            exhaustive=exhaustive,
            filters=filters or Filters(),
            group_by=group_by,
            explain=explain,
            max_distance=max_distance,
        )
        return self.search_all([Query(x, modulation, options)], model=model)[0]

    def search_all(
        self, queries: Sequence[Query], *, model: str | None = None
    ) -> Sequence[SearchResult]:
        """Rank the gallery for each of several queries, which read it and the store together.

        model: the checkpoint that made them, where it may have been changed since. Raises
        ModelVersionConflict for queries of another checkpoint, and ValueError for x, γ or β of
        another shape or not finite. No answer depends on the other queries. Exhaustive ones let
        others that come meanwhile go first, and raise Abandoned as `give_way` does.
        """
        follower = self._of(model)
        follower.catch_up()
        with turn(long=any(query.options.exhaustive for query in queries)):
            return answers(follower, queries, self._candidates)

    def reembed(
        self,
        info: CheckpointInfo,
        embed: Embed,
        *,
        decode: Decode = decode_here,
        switched: Callable[[], None] = lambda: None,
        progress: Callable[[Progress], None] | None = None,
        stop: threading.Event | None = None,
        actor: str = "system",
    ) -> None:
        """Embed every item with another checkpoint, then search with that one.

        Until the switch, searches and enrollments use the old features; the switch takes as long as
        it takes to embed what was enrolled at the last moment. The old features stay in the store
        until `drop_version`. embed: the new checkpoint's, B crops → B×P×D. decode: of stored crops.
        switched: called when the new features are in use. stop: set it, and ReembeddingStopped is
        raised soon; the same call later continues from there. Raises ModelVersionConflict while
        another one runs, GalleryDamaged where a crop cannot be embedded or the check of a sample
        fails: the old features then stay in use.
        """
        if not self._reembedding.acquire(blocking=False):
            raise ModelVersionConflict(
                "the gallery is being embedded again already; wait until that is done"
            )
        try:
            fingerprint = self._building = info.fingerprint
            told = progress or (lambda _: None)
            with known_to_all(self.replicas, fingerprint, actor, told) as (tell, taken_over):
                self._store.versions.register(fingerprint, info.config.model_dump(mode="json"))
                store = self._store.seen_with(fingerprint, info.config.embedding_size)
                work = Reembedding(
                    store,
                    info,
                    embed,
                    decode,
                    progress=tell,
                    stopping=lambda: (
                        self._closing.is_set()
                        or taken_over()
                        or (stop is not None and stop.is_set())
                    ),
                )
                work.fill()
                work.verify()
                follower = self._follower.with_version(store, info)
                try:
                    old = self._switch(follower, work, actor)
                except BaseException:
                    follower.close()
                    raise
            switched()
            old.close()  # which may take as long as the training of its index
        finally:
            self._building = None
            self._reembedding.release()

    def run(self) -> Run | None:
        """The newest run that embeds again, of any replica; None where nobody shares the store."""
        return None if self.replicas is None else self.replicas.run()

    def adopt(self, info: CheckpointInfo) -> None:
        """Search with the version that another replica has made the active one.

        Embed with its checkpoint from then on. Raises ModelVersionUnknown.
        """
        with self._reembedding:
            store = self._store.seen_with(info.fingerprint, info.config.embedding_size)
            follower = self._follower.with_version(store, info)
            with self._enrolling.alone():
                old = self._use(follower)
            old.close()

    def drop_version(self, fingerprint: str, *, actor: str = "system") -> None:
        """Remove a checkpoint's features from the store.

        Raises ModelVersionUnknown, and ModelVersionConflict for the one that is in use or that
        the gallery is being embedded with.
        """
        if fingerprint == self.model:
            raise ModelVersionConflict(
                f"model version {fingerprint[:12]} is the one in use; embed the gallery with "
                "another checkpoint before"
            )
        run = self.run()
        elsewhere = run.details["checkpoint"] if run is not None and run.alive else None
        if fingerprint in (self._building, elsewhere):
            raise ModelVersionConflict(
                f"the gallery is being embedded with model version {fingerprint[:12]}; wait until "
                "that is done"
            )
        self._store.versions.drop(fingerprint, actor=actor)

    def backup(self, target: Path | BinaryIO, *, actor: str = "system") -> None:
        """Write all that is stored at one moment into a file that `restore` takes.

        Enrollments, searches and deletions continue. A file at a path is complete or absent, and
        readable by its owner only. Raises BackupRunning while another one is taken, StorageFull
        and StorageUnwritable, also for the temporary copy in the data folder.
        """
        self._backups.write(target, actor=actor)

    def begin_backup(self, *, actor: str = "system") -> Backup:
        """The same for a caller that reads the blocks and closes it. Raises as `backup`."""
        return self._backups.begin(actor=actor)

    def move_crops(self, *, back: bool = False) -> Iterator[int]:
        """Put every crop where a new one of its size would be → how many, after each step.

        back: all into the database. See `Crops.move`.
        """
        return self._store.crops.move(back=back)

    def save_index(self) -> bool:
        """Write the index's snapshot for the next start, as background work does regularly.

        False: the disk refused, or something was erased meanwhile.
        """
        return self._follower.save()

    @property
    def lag(self) -> float:
        """Seconds since what is searched was surely all that the store holds; 0 on SQLite."""
        return self._follower.lag

    def refuse_stale(self) -> None:
        """Raise DatabaseUnavailable where the other replicas were not followed for too long.

        Raises IndexOutOfStep where they have gone on to another checkpoint.
        """
        self._follower.refuse_stale()
        if self.replicas is not None and self.replicas.successor is not None:
            raise IndexOutOfStep(
                f"the gallery has gone on to the checkpoint {self.replicas.successor[:12]}, and "
                "this replica follows once it has loaded its file, which must lie beside its own; "
                "ask another replica, or try again in a few seconds"
            )

    def check(self) -> None:
        """Check index, model version and data folder.

        Raises StorageMoved, IndexOutOfStep, ModelVersionConflict, StorageUnwritable or
        DatabaseUnavailable, naming what fails.
        """
        self._store.database.check()
        self.refuse_stale()  # first: a database that hangs answers nothing of what follows
        stored, searchable = self._follower.counts()
        if stored != searchable:
            raise IndexOutOfStep(
                f"the index holds {searchable} items, the store {stored}; restart the service, "
                "which rebuilds the index"
            )
        if self._store.versions.state(self.model) == "retired":
            raise ModelVersionConflict(
                f"the gallery went on with another checkpoint than {self.model[:12]}; put its file "
                "beside that one's, or restart the service with it"
            )
        try:
            with tempfile.TemporaryFile(dir=self._folder) as probe:
                probe.write(b"writable")
                probe.flush()
        except OSError as error:
            raise StorageUnwritable(
                f"the data folder {self._folder} cannot be written ({error.strerror}); "
                "free space or check its mount"
            ) from error

    @contextmanager
    def _changing(self) -> Iterator[Store]:
        """The store, for a change that the version in use follows; no switch happens meanwhile."""
        with self._enrolling.shared():
            follower = self._follower
            with follower.writing():
                yield follower.store

    @property
    def _follower(self) -> Follower:
        """The version in use. Raises DatabaseUnavailable once the gallery is closed."""
        self._refuse_closed()
        return self._current

    @property
    def _store(self) -> Store:
        return self._follower.store

    @property
    def _backups(self) -> Backups:
        self._refuse_closed()
        return self._backing_up

    def _refuse_closed(self) -> None:
        if self._closing.is_set():
            raise DatabaseUnavailable("the gallery is closed; open it again")

    def _of(self, model: str | None) -> Follower:
        """The version in use. Raises ModelVersionConflict where `model` names another."""
        follower = self._follower
        if model not in (None, follower.info.fingerprint):
            raise ModelVersionConflict(
                f"the gallery is searched with model version {follower.info.fingerprint[:12]} and "
                f"the features are of {str(model)[:12]}; embed the image again"
            )
        return follower

    def _switch(self, follower: Follower, work: Reembedding, actor: str) -> Follower:
        """Use `follower` from now on → the one that was in use."""
        work.fill()  # most of what came while the new index was built, before writers wait
        with self._enrolling.alone():
            with follower.writing():
                for attempt in range(_TRIES):
                    work.fill()
                    try:
                        follower.store.versions.activate(
                            follower.info.fingerprint, actor=actor, embed=work.embedded
                        )
                        break
                    except ModelVersionConflict:  # others enrolled too many in between
                        if attempt == _TRIES - 1:
                            raise
            return self._use(follower)

    def _use(self, follower: Follower) -> Follower:
        old, self._current = self._current, follower
        if self.replicas is not None:
            self.replicas.model, self.replicas.successor = follower.info.fingerprint, None
        return old

    def _follow_others(self) -> None:
        try:
            self._current.follow()
        except Exception as error:
            if not report_loss(error):
                raise

    def _keep(self) -> None:
        """Background work: follow other processes' changes, and renew the snapshot."""
        told = ""  # what goes on failing is said once
        while not self._closing.wait(_KEEP_SECONDS):
            try:
                self._current.store.database.check()  # else a snapshot would go to another folder
                self._current.maintain()
                self._current.store.finish_erasing()
                told = ""
            except ServiceError as error:
                if error.code != told:
                    log.warning("data folder %s: %s", self._folder, error.detail)
                    if isinstance(error, StorageMoved):
                        self._current.store.database.save_log()
                told = error.code
            except Exception as error:  # the next round tries again
                if report_loss(error):
                    return
                log.exception("background work on the gallery failed")
