"""One shard of a gallery: a share of its items in memory, read from the store and kept in step.

It writes nothing. A search says how far the store was when it began, and the shard follows so far
before it answers: what was enrolled is found and what was deleted is not, whichever shard has it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from model import CheckpointInfo, CMTConfig
from service.errors import DatabaseUnavailable, MemoryExhausted, ServiceError
from service.gallery.feed import Position, Slice
from service.gallery.follower import Follower
from service.gallery.index.figures import IndexChoice
from service.gallery.index.room import capacity
from service.gallery.index.shard import Counters, Statistics
from service.gallery.storage.database import Database, address_of
from service.gallery.storage.store import Store
from service.gallery.storage.streaming import View
from service.kit.device_loss import report_loss
from service.kit.heap import give_back_large_blocks
from service.kit.host_memory import UNKNOWN
from service.kit.precedence import turn
from service.scale.findings import Finding, Question, findings

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0  # between two attempts to read the store, or items that had no memory


@dataclass(frozen=True)
class Plan:
    """What a shard is made from: its share of the items that have features of a checkpoint.

    folder: which SQLite's file is in. url: of the database, None for the file in the folder.
    device, kind: as `Gallery.open` takes them.
    """

    part: Slice
    folder: Path
    url: str | None
    config: dict[str, Any]
    fingerprint: str
    device: str
    kind: IndexChoice

    @property
    def info(self) -> CheckpointInfo:
        """As much of the checkpoint as a shard needs."""
        return CheckpointInfo(self.fingerprint, CMTConfig.model_validate(self.config))


@dataclass(frozen=True)
class Sizes:
    """What a shard has, and how often it searched.

    room: more items that its memory holds. full: whether it lacks some for want of memory.
    """

    statistics: Statistics
    counters: Counters
    room: int
    full: bool

    @classmethod
    def none(cls) -> Sizes:
        """Of no shard."""
        statistics = Statistics(0, 0, "SQfp16", 0, 0, 0, 0, 0, 0)
        return cls(statistics, Counters(), room=UNKNOWN, full=False)


@dataclass(frozen=True)
class Counts:
    """Items of a share in the store, and in the shard. full: see `Sizes`."""

    stored: int
    searchable: int
    full: bool


class NotLoaded(Exception):  # noqa: N818
    """The shard has not read its share yet."""


class _SliceStore:
    """As much of a `Store` as a follower reads of it: its share of the items."""

    shared = False  # whoever asks says how far to follow

    def __init__(self, plan: Plan) -> None:
        self._plan, self._size = plan, plan.info.config.embedding_size
        address = address_of(plan.folder, plan.url)
        if address.get_backend_name() == "sqlite" and not Path(str(address.database)).is_file():
            raise DatabaseUnavailable(
                f"a shard finds no database at {address.database}; it is read where the service "
                "that writes it runs, use PostgreSQL for shards on other hosts"
            )
        # Not migrated and without the folder's lock: the serving process has it.
        self._database = Database(plan.folder, plan.url, migrate=False)

    @contextmanager
    def view(self) -> Iterator[View]:
        """One state of the store."""
        with self._database.reading() as connection:
            yield View(connection, self._plan.fingerprint, self._size, self._plan.part)

    def close(self) -> None:
        """Close the database."""
        self._database.close()


class SliceShard:
    """A shard by its plan, which reads its share in the background. Thread-safe.

    Where its memory does not hold all of its share, it answers from what it holds and says so.
    """

    def __init__(self, plan: Plan) -> None:
        give_back_large_blocks()  # of this process, which has nothing else to do
        self._plan = plan
        self._follower: Follower | None = None
        self._reached = Position(0, 0)  # surely followed so far
        self._again = 0.0  # when items are tried again that had no memory
        self._following = threading.Lock()
        self._closing = threading.Event()
        self._trouble: ServiceError | None = None
        self._tried = threading.Event()
        self._loader = threading.Thread(target=self._load, name="shard loader", daemon=True)
        self._loader.start()

    def started(self) -> None:
        """Nothing: whoever calls it knows that the shard's process runs."""

    def loaded(self) -> int:
        """Wait until the share is read → its items. Raises what kept it from being read."""
        self._tried.wait()
        if self._trouble is not None:
            raise self._trouble
        return len(self._opened().shard)

    def search(self, position: Position, questions: Sequence[Question]) -> list[Finding]:
        """Answer from a state of the store that is no older than `position`.

        Raises NotLoaded, what `Follower.follow` raises, and what `Shard.search` does.
        """
        follower = self._opened()
        with losses_reported():
            self._follow_to(position, follower)
            requests = [question.request() for question in questions]
            with turn(long=any(request.exhaustive for request in requests)):
                scored = follower.shard.search(requests)
            return findings(questions, requests, scored, full=self._full)

    def follow(self, position: Position) -> None:
        """Follow the store at least to `position`. Raises NotLoaded, and as `search`."""
        follower = self._opened()
        with losses_reported():
            self._follow_to(position, follower)

    def ready(self) -> None:
        """Raise NotLoaded, or as `search`, where it cannot answer yet."""
        follower = self._opened()
        with losses_reported(), self._following:
            self._catch_up(follower)

    def counts(self) -> Counts:
        """Of its share. Raises NotLoaded, and as `search`."""
        follower = self._opened()
        with losses_reported():
            with self._following:
                self._catch_up(follower)
            if not self._full:
                return Counts(*follower.counts(), full=False)
            with follower.store.view() as view:
                return Counts(view.count(), len(follower.shard), full=True)

    def sizes(self) -> Sizes:
        """Its sizes. Raises NotLoaded, and as `search` where it was full."""
        follower, config = self._opened(), self._plan.info.config
        if self._full:
            self.ready()
        free = capacity((config.parts + 1) * config.dim, self._plan.device)
        room = free.on_host + (free.on_device or 0)
        shard = follower.shard
        return Sizes(shard.statistics(), shard.counters, room, self._full)

    def close(self) -> None:
        """End background work."""
        self._closing.set()
        self._loader.join()
        if self._follower is not None:
            self._follower.close()

    def _behind(self, position: Position) -> bool:
        """Whether the shard may lack something that the store had at a position.

        States of the store follow each other, and every deletion has a later number: only among
        those of one number does the last item tell. Items that had no memory wait for a while.
        """
        reached = self._reached
        if reached.change != position.change:
            return reached.change < position.change
        waits = self._full and time.monotonic() < self._again
        return reached.item < position.item and not waits

    def _follow_to(self, position: Position, follower: Follower) -> None:
        if self._behind(position):
            with self._following:
                if self._behind(position):
                    self._catch_up(follower)

    def _catch_up(self, follower: Follower) -> None:
        """Follow the store as far as the memory goes: what was deleted in any case."""
        try:
            follower.follow()
        except MemoryExhausted:
            self._again = time.monotonic() + _AGAIN_SECONDS
        self._reached = follower.position

    @property
    def _full(self) -> bool:
        """Whether items have no memory."""
        return self._follower is not None and self._follower.lacks_memory

    def _opened(self) -> Follower:
        if self._follower is None:
            trouble = self._trouble
            raise NotLoaded("it still reads its items" if trouble is None else trouble.detail)
        return self._follower

    def _load(self) -> None:
        while not self._closing.is_set():
            try:
                store = _SliceStore(self._plan)
                try:
                    self._follow(store)
                except BaseException:
                    store.close()
                    raise
                self._trouble = None
                return
            except ServiceError as error:
                log.warning("a shard could not read its items: %s", error.detail)
                self._trouble = error
            except Exception as error:
                report_loss(error)
                log.exception("a shard could not read its items")
                self._trouble = ServiceError(f"a shard could not read its items: {error}")
            finally:
                self._tried.set()
            self._closing.wait(_AGAIN_SECONDS)

    def _follow(self, store: _SliceStore) -> None:
        plan = self._plan
        nowhere = plan.folder / "index" / f"slice-{plan.part.index}"  # no snapshot of a share
        follower = Follower(
            *(cast(Store, store), plan.info, nowhere, plan.device, plan.kind, None), incomplete=True
        )
        self._reached, self._follower = follower.position, follower


@contextmanager
def losses_reported() -> Iterator[None]:
    """Report a device that is lost meanwhile, for the process to end."""
    try:
        yield
    except Exception as error:
        report_loss(error)
        raise
