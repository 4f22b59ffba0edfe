"""The gallery: the store is the truth, the shard its copy in memory; every change goes to both."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model import CheckpointInfo, Modulation
from service.errors import IndexOutOfStep, StorageUnwritable
from service.gallery.lock import FolderLock
from service.gallery.records import Filters, Hit, Item, NewItem, Page, RequestKey, SearchResult
from service.gallery.rows import microseconds
from service.gallery.shard import Counters, Scored, Shard
from service.gallery.store import Store, Stored

log = logging.getLogger(__name__)

DEFAULT_CANDIDATES = 256
_WIDEN = 4  # how much longer the shortlist gets where it held too few groups
_TRIES = 8  # searches again because an item was deleted between search and fetch


class Gallery:
    """Enrolled crops of one data folder, searched with the features of one checkpoint.

    Usable without HTTP, from several threads. `awaiting` counts items whose features come from
    another checkpoint: they are kept and listed, but no query returns them until they are
    embedded again, because features of two checkpoints cannot be compared.
    """

    def __init__(
        self, lock: FolderLock, store: Store, shard: Shard, folder: Path, candidates: int
    ) -> None:
        self._lock, self._store, self._shard = lock, store, shard
        self._folder, self._candidates = folder, candidates
        self._changing = threading.Lock()
        self.awaiting = store.count() - len(shard)

    @classmethod
    def open(
        cls,
        data_dir: Path,
        info: CheckpointInfo,
        *,
        device: str = "cpu",
        database_url: str | None = None,
        candidates: int = DEFAULT_CANDIDATES,
    ) -> Gallery:
        """Open or create the gallery in `data_dir`; its index is rebuilt from the store.

        device: "cpu" or "cuda", where the features live. Raises a ServiceError, one sentence:
        GalleryLocked, GalleryVersion (newer schema), GalleryDamaged, DatabaseUnavailable,
        StorageUnwritable, StorageFull.
        """
        folder = Path(data_dir)
        lock = FolderLock(folder)
        try:
            store = Store(folder, info.fingerprint, info.config.embedding_size, database_url)
            shard = Shard(info.config, device)
            shard.load(store.stream())
            gallery = cls(lock, store, shard, folder, candidates)
        except BaseException:
            lock.release()
            raise
        if gallery.awaiting:
            log.warning(
                "%d items were embedded by another checkpoint; queries leave them out until they "
                "are embedded again",
                gallery.awaiting,
            )
        return gallery

    @property
    def counters(self) -> Counters:
        """How often recall and rescoring ran."""
        return self._shard.counters

    def __len__(self) -> int:
        """Items of any checkpoint."""
        return len(self._shard) + self.awaiting

    def close(self) -> None:
        """Close the store and give the folder free."""
        self._shard.close()
        self._store.close()
        self._lock.release()

    def add(self, new: Sequence[NewItem], features: Tensor) -> list[Item]:
        """Enroll items with their features (B×P×D): durable, and found by the next query.

        All or none. Raises StorageFull where there is no space, and ValueError for features that
        are not finite in fp16.
        """
        rows = _as_stored(features)
        if len(rows) != len(new):
            raise ValueError(f"{len(new)} items with {len(rows)} features")
        if not new:
            return []
        with self._changing:
            added = self._store.add(new, rows)
            items = [item for _, item in added]
            self._shard.add(
                Stored(
                    numbers=[number for number, _ in added],
                    persons=[item.person_id for item in items],
                    cameras=[item.camera_id for item in items],
                    modalities=[item.modality for item in items],
                    captured=[
                        None if item.captured_at is None else microseconds(item.captured_at)
                        for item in items
                    ],
                    features=rows,
                )
            )
        return items

    def get(self, item_id: str) -> Item:
        """Raises ItemNotFound."""
        return self._store.get(item_id)

    def enrolled_by(self, request: RequestKey) -> Item | None:
        """The item that an equal request enrolled before. Raises IdempotencyConflict."""
        return self._store.enrolled_by(request)

    def image(self, item_id: str) -> tuple[bytes, str]:
        """The stored crop and its media type. Raises ItemNotFound."""
        return self._store.image(item_id)

    def list(self, filters: Filters, limit: int, cursor: str | None = None) -> Page:
        """Items in order of enrollment. Raises CursorInvalid."""
        return self._store.list(filters, limit, cursor)

    def delete(self, item_id: str) -> None:
        """Erase an item: once this returns, no query finds it. Raises ItemNotFound."""
        with self._changing:
            self._erase([self._store.number_of(item_id)])

    def delete_where(self, person_id: str) -> int:
        """Erase a person's items → how many."""
        with self._changing:
            return self._erase(self._store.numbers_of_person(person_id))

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
    ) -> SearchResult:
        """Rank the gallery for one query x (P×D) under its γ, β (1×D); None: unmodulated.

        candidates: length of the recall stage's shortlist, at least top_k. group_by "person_id":
        the best image per person; the shortlist grows until top_k groups are in it. max_distance
        drops weaker results. With a cosine checkpoint every search is exhaustive. Raises
        ValueError for numbers below 1, and for x, γ or β of another shape or not finite.
        """
        if top_k < 1 or (candidates is not None and candidates < 1):
            raise ValueError("top_k and candidates must be at least 1")
        filters = filters or Filters()
        modulation = modulation or Modulation.identity(1, x.shape[1])
        shortlist = max(top_k, candidates or self._candidates)
        for attempt in range(_TRIES):
            while True:
                scored = self._shard.search(
                    x,
                    modulation,
                    shortlist,
                    exhaustive=exhaustive,
                    filters=filters,
                    explain=explain,
                )
                chosen = _chosen(scored, top_k, group_by)
                complete = len(chosen) >= top_k or len(scored.numbers) >= scored.searched
                if complete or group_by is None:
                    break
                shortlist *= _WIDEN
            if max_distance is not None:
                chosen = [place for place in chosen if scored.distances[place] <= max_distance]
            started = time.perf_counter()
            items = self._store.fetch([int(scored.numbers[place]) for place in chosen])
            # An item may go between search and fetch; the next search knows of it.
            if len(items) == len(chosen) or attempt == _TRIES - 1:
                break
        found = [place for place in chosen if int(scored.numbers[place]) in items]
        return SearchResult(
            hits=[
                _hit(scored, place, rank, items[int(scored.numbers[place])])
                for rank, place in enumerate(found, start=1)
            ],
            searched=scored.searched,
            candidates=scored.searched if scored.exhaustive else len(scored.numbers),
            exhaustive=scored.exhaustive,
            timings_ms={
                "recall": scored.recall_ms,
                "rescore": scored.rescore_ms,
                "fetch": 1e3 * (time.perf_counter() - started),
            },
        )

    def check(self) -> None:
        """Raise IndexOutOfStep, StorageUnwritable or DatabaseUnavailable, naming what fails."""
        with self._changing:
            stored, searchable = self._store.count_embedded(), len(self._shard)
        if stored != searchable:
            raise IndexOutOfStep(
                f"the index holds {searchable} items, the store {stored}; restart the service, "
                "which rebuilds the index"
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

    def _erase(self, numbers: Sequence[int]) -> int:
        # Out of the shard first: a search that fetches a row already erased then searches again
        # without it, and always gives as many hits as there are.
        buried = self._shard.bury(numbers)
        try:
            deleted = self._store.delete(numbers)
        except BaseException:
            self._shard.revive(buried)
            raise
        self.awaiting -= deleted - len(buried)
        self._shard.settle(buried)
        return deleted


def _as_stored(features: Tensor) -> npt.NDArray[np.float16]:
    """B×P×D → B×(P·D) in the form that is stored."""
    half = features.detach().flatten(1).half().cpu()
    if not bool(half.isfinite().all()):
        raise ValueError("features are not finite in fp16; the checkpoint is damaged or untrained")
    rows: npt.NDArray[np.float16] = half.numpy()
    return rows


def _chosen(scored: Scored, top_k: int, group_by: str | None) -> list[int]:
    """Places in `scored` of the results, nearest first."""
    places = np.arange(len(scored.numbers))
    if group_by is not None:
        # `scored` is sorted, so the first of each group is its best.
        _, places = np.unique(scored.groups, return_index=True)
        places.sort()
    return [int(place) for place in places[:top_k]]


def _hit(scored: Scored, place: int, rank: int, item: Item) -> Hit:
    ranks, plain, parts = scored.recall_ranks, scored.unmodulated_ranks, scored.parts
    explained = plain is not None
    return Hit(
        rank=rank,
        item=item,
        distance=float(scored.distances[place]),
        recall_rank=None if ranks is None else int(ranks[place]),
        unmodulated_rank=None if plain is None else int(plain[place]),
        parts=parts[place].tolist() if explained and parts is not None else None,
    )
