"""One search answered: what the shard found, grouped, cut, and read from the store."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model import Modulation
from service.errors import ModelVersionConflict
from service.gallery.follower import Follower
from service.gallery.records import Filters, Hit, Item, SearchResult
from service.gallery.shard import Scored

_WIDEN = 4  # how much longer the shortlist gets where it held too few people
_TRIES = 8  # searches again because an item was deleted between search and fetch


@dataclass(frozen=True)
class Query:
    """What is searched for: x P×D under γ, β of 1×D.

    Attributes:
        top_k: wanted items; with by_person, wanted people, of whom the best item is given.
        shortlist: how many the recall stage hands on; it grows until top_k people are in it, or
            all who match.
        max_distance: weaker results are dropped.
    """

    x: Tensor
    modulation: Modulation
    top_k: int
    shortlist: int
    exhaustive: bool
    filters: Filters
    by_person: bool
    explain: bool
    max_distance: float | None


def answer(follower: Follower, query: Query) -> SearchResult:
    """Rank what `follower` has in memory, and read the best from its store.

    Raises ModelVersionConflict where its version went out of use meanwhile.
    """
    for attempt in range(_TRIES):
        scored, chosen = _search(follower, query)
        if query.max_distance is not None:
            chosen = [place for place in chosen if scored.distances[place] <= query.max_distance]
        started = time.perf_counter()
        items = follower.store.fetch([int(scored.numbers[place]) for place in chosen])
        # An item may go between search and fetch; the next search knows of it.
        if len(items) == len(chosen) or attempt == _TRIES - 1:
            break
        follower.follow()
    if _out_of_use(follower, items.values()):
        raise ModelVersionConflict(
            "the gallery has gone on to another checkpoint during the search; embed the image again"
        )
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


def _out_of_use(follower: Follower, items: Iterable[Item]) -> bool:
    """Whether the items are another version's by now. One that is being built finds such items too,
    by its own features: they are its own once it is in use."""
    mine = follower.info.fingerprint
    if all(item.model == mine for item in items):
        return False
    return follower.store.versions.state(mine) == "retired"


def _search(follower: Follower, query: Query) -> tuple[Scored, list[int]]:
    """What the shard scored, nearest first, and the places in it of the results."""
    shortlist = query.shortlist
    while True:
        scored = follower.shard.search(
            *(query.x, query.modulation, shortlist),
            exhaustive=query.exhaustive,
            filters=query.filters,
            explain=query.explain,
        )
        places = np.arange(len(scored.numbers))
        if query.by_person:
            # `scored` is sorted, so the first of each group is its best.
            _, places = np.unique(scored.groups, return_index=True)
            places.sort()
        chosen = [int(place) for place in places[: query.top_k]]
        if (
            not query.by_person
            or len(chosen) >= query.top_k
            or len(chosen) == scored.searched_groups()
        ):
            return scored, chosen
        shortlist *= _WIDEN


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
