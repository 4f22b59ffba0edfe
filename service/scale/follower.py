"""A model version in several shards: the serving process knows how far its store has come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from model import CheckpointInfo
from service.gallery.feed import Position
from service.gallery.follower import Follower
from service.gallery.index.shard import Presence, Shard
from service.gallery.storage.store import Store
from service.gallery.storage.streaming import View
from service.scale.shards import Crew, Shards

Start = Callable[[CheckpointInfo, int], Crew]
"""Starts the shards of a checkpoint, of so many items, and waits until they have read them."""


class ShardedFollower(Follower):
    """Follows by position only: the shards read their items from the store themselves.

    start: see `Start`. partial: answer also where some shards are missing.
    """

    def __init__(
        self, store: Store, info: CheckpointInfo, folder: Path, start: Start, *, partial: bool
    ) -> None:
        self._start, self._partial = start, partial
        super().__init__(store, info, folder, "cpu", None, None)

    @property
    def shards(self) -> Shards:
        """What stands in for the shard."""
        return cast(Shards, self.shard)

    @property
    def presence(self) -> Presence:
        return Presence(self.shards.present, self.shards.total)

    def with_version(self, store: Store, info: CheckpointInfo) -> Follower:
        folder = self._folder.parent
        return ShardedFollower(store, info, folder, self._start, partial=self._partial)

    def counts(self) -> tuple[int, int]:
        self.follow()
        return self.shards.counts()

    def save(self) -> bool:
        return False  # a shard reads its share from the store

    def _new_shard(self) -> Shard:
        with self.store.view() as view:
            items = view.count()
        crew = self._start(self.info, items)
        shards = Shards(crew, self.info.config, lambda: self.position, partial=self._partial)
        return cast(Shard, shards)

    def _snapshot_due(self) -> bool:
        return False

    def _begin_anew(self) -> None:
        self.shard.close()  # first, since the next ones need its memory
        super()._begin_anew()

    def _advance(self, view: View, newest: Position) -> None:
        if newest == self.position:
            return
        if newest.change > self.position.change and self.position != Position(0, 0):
            self._remove_snapshot()  # of a start without shards: it has what was deleted
        self.position = newest
        self.shards.follow(newest)
