"""The shards of a gallery as one: asked together, and their findings ranked by the same code."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

from model import CMTConfig
from model.ranking import DEPTH
from service.errors import MemoryExhausted, ShardsMissing
from service.gallery.feed import Position
from service.gallery.index.ranker import Presence, Ranked, Scale, rank
from service.gallery.index.room import NoRoom
from service.gallery.index.searcher import Counters, Scored, SearchRequest
from service.gallery.index.shard import Statistics
from service.kit.text import counted
from service.scale.findings import Finding, Question, merged
from service.scale.slice import Counts, Sizes

T = TypeVar("T", Counters, Statistics)

_SIZES_SECONDS = 1.0  # that the shards' sizes are not asked for again
_LATER = {"Retry-After": "5"}  # clients wait so long for a shard, which takes some of these


class Crew(Protocol):
    """The shards, wherever they run. `SliceShard` says what they can be asked."""

    def __len__(self) -> int: ...

    @property
    def present(self) -> int:
        """How many of them answer now."""
        ...

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Ask all of them → what those said that answer, in the order of the shards.

        Raises what a shard raised.
        """
        ...

    def tell(self, method: str, *arguments: Any) -> None:
        """Ask all of them and wait for nothing."""
        ...

    def close(self) -> None:
        """End them."""
        ...


class Shards:
    """What a `Follower` needs of its shard, by several. Thread-safe.

    position: how far the store has come, which every answer includes. partial: answer also where
    some shards are missing.
    """

    def __init__(
        self, crew: Crew, config: CMTConfig, position: Callable[[], Position], *, partial: bool
    ) -> None:
        self._crew, self._config, self._position = crew, config, position
        self._partial = partial
        self._asked, self._known = -math.inf, [Sizes.none()]
        self._enrolling = threading.Lock()
        self._enrolled = 0  # since the shards were asked how much room they have

    def __len__(self) -> int:
        return self.statistics().items

    @property
    def total(self) -> int:
        """How many there are."""
        return len(self._crew)

    @property
    def present(self) -> int:
        """How many of them answer now, with all of their items."""
        return max(0, self._crew.present - sum(sizes.full for sizes in self._known))

    def rank(self, requests: Sequence[tuple[SearchRequest, Scale]]) -> list[Ranked]:
        """`ranker.rank` over all shards. Raises ShardsMissing."""
        kept = DEPTH if any(scale.rerank for _, scale in requests) else 0
        asking = _Asking(self, kept)
        return [
            replace(one, shards=Presence(asking.present, self.total))
            for one in rank(asking, requests)
        ]

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """`Crew.ask`. Raises ShardsMissing where too few answer."""
        answers = self._crew.ask(method, *arguments)
        if not answers or (len(answers) < self.total and not self._partial):
            raise ShardsMissing(
                f"only {len(answers)} of {self.total} shards of the gallery answer; the others are "
                "started again, try again in some seconds",
                headers=_LATER,
            )
        return answers

    def find(self, requests: Sequence[SearchRequest], kept: int) -> tuple[list[Scored], int]:
        """What one shard would find, and how many shards it is from that lack nothing."""
        questions = [Question.of(request, kept) for request in requests]
        answers: list[list[Finding]] = self.ask("search", self._position(), questions)
        by_request = list(zip(*answers, strict=True))
        whole = sum(not found[0].full for found in answers)
        if whole < len(answers) and not self._partial:
            raise ShardsMissing(self._lacking(len(answers) - whole, "some items"))
        return merged(self._config, requests, by_request), whole

    def follow(self, position: Position) -> None:
        """Have the shards follow the store ahead of the next search."""
        self._crew.tell("follow", position)

    def counts(self) -> tuple[int, int]:
        """Items in the store, and in the shards, of the shares of those that answer.

        Raises MemoryExhausted where a shard lacks items for want of memory.
        """
        counts: list[Counts] = self.ask("counts")
        full = [one for one in counts if one.full]
        if full:
            lacked = sum(one.stored - one.searchable for one in full)
            raise MemoryExhausted(self._lacking(len(full), counted(lacked, "item")))
        return sum(one.stored for one in counts), sum(one.searchable for one in counts)

    def _lacking(self, full: int, items: str) -> str:
        return (
            f"{full} of {self.total} shards of the gallery lack memory for {items}, which are "
            "stored and which no query finds; free memory on their machines, or start again with "
            "more shards on more machines"
        )

    @property
    def counters(self) -> Counters:
        """Of all shards together."""
        return _summed([sizes.counters for sizes in self._sizes()])

    def statistics(self) -> Statistics:
        """Of all shards together; the kind of index is the first one's."""
        return _summed([sizes.statistics for sizes in self._sizes()])

    def _sizes(self) -> list[Sizes]:
        """Of the shards that answer, asked once in a while: a scrape wants several numbers."""
        now = time.monotonic()
        if now - self._asked > _SIZES_SECONDS:
            self._asked = now  # meanwhile others go by what is known
            before = self._enrolled
            if sizes := self._crew.ask("sizes"):
                with self._enrolling:
                    self._known, self._enrolled = sizes, self._enrolled - before
        return self._known

    @contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Refuse what a shard may have no memory for, as each has told. Raises NoRoom.

        Nothing is held: what is enrolled between two of their answers is counted for every shard,
        and fits what each keeps free besides.
        """
        with self._enrolling:
            if min(sizes.room for sizes in self._known) < self._enrolled + count:
                raise NoRoom("a shard has no memory for more features")
            self._enrolled += count
        yield

    def tend(self) -> None:
        """Ask the shards for their sizes, so that `room_for` need not wait for them."""
        self._sizes()

    def close(self) -> None:
        """End the shards."""
        self._crew.close()


@dataclass
class _Asking:
    """Searches for one ranking. present: how many shards answered."""

    shards: Shards
    kept: int
    present: int = 0

    def search(self, queries: Sequence[SearchRequest]) -> list[Scored]:
        """As `Searcher.search`."""
        found, self.present = self.shards.find(queries, self.kept)
        return found


def _summed(parts: Sequence[T]) -> T:
    first = parts[0]
    values: dict[str, Any] = {}
    for field in fields(first):
        of_parts = [getattr(part, field.name) for part in parts]
        values[field.name] = of_parts[0] if isinstance(of_parts[0], str) else sum(of_parts)
    return replace(first, **values)
