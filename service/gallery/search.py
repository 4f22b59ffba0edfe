"""Answers of searches: what the shard ranked, grouped, cut, and read from the store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model import Modulation
from service.errors import ModelVersionConflict
from service.gallery.follower import Follower
from service.gallery.index.shard import Ranked, Scale, SearchRequest
from service.gallery.records import Filters, Hit, Item, SearchResult

_WIDEN_FOR_GROUPS = 4  # how much longer the shortlist gets where it held too few people
_TRIES = 8  # searches again because an item was changed between search and fetch


@dataclass(frozen=True)
class Options:
    """How to search.

    top_k: how many items; grouped: how many people, each with the best item.
    candidates: length of the recall stage's shortlist, at least top_k; None: the gallery's own.
    Grouped, it grows until top_k groups are in it, or all that match.
    exhaustive: rank all items, proven. With a cosine checkpoint every search is.
    group_by: "person_id" for the best image per person.
    max_distance: weaker results are dropped.
    """

    top_k: int = 20
    candidates: int | None = None
    exhaustive: bool = False
    filters: Filters = field(default_factory=Filters)
    group_by: str | None = None
    explain: bool = False
    max_distance: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a length below 1 or another grouping."""
        if self.top_k < 1 or (self.candidates is not None and self.candidates < 1):
            raise ValueError("top_k and candidates must be at least 1")
        if self.group_by not in (None, "person_id"):
            raise ValueError(f"results are grouped by person_id, not by {self.group_by}")


@dataclass(frozen=True)
class Query:
    """What is searched for: x (P×D) under γ, β (1×D); None: unmodulated.

    scale: what its scores and probabilities go by.
    """

    x: Tensor
    modulation: Modulation | None
    options: Options
    scale: Scale = field(default_factory=Scale)


def answers(follower: Follower, queries: Sequence[Query], candidates: int) -> list[SearchResult]:
    """Rank what `follower` has in memory, and read the best from its store: one for each query.

    candidates: for queries that do not set it. Raises ModelVersionConflict where its version was
    retired meanwhile.
    """
    queries = [_meant(query) for query in queries]
    results: dict[int, SearchResult] = {}
    waiting = list(range(len(queries)))
    for attempt in range(_TRIES):
        found = _search(follower, [queries[i] for i in waiting], candidates)
        started = time.perf_counter()
        items = follower.store.fetch(sorted({n for one in found for n in one.numbers}))
        if _out_of_use(follower, items.values()):
            raise ModelVersionConflict(
                "the gallery has gone on to another checkpoint during the search; embed the image "
                "again"
            )
        fetch_ms = 1e3 * (time.perf_counter() - started)
        incomplete = []
        for i, one in zip(waiting, found, strict=True):
            # An item may be deleted or get other labels between search and fetch, here or in
            # another process; the next search knows of it.
            valid = _valid(one.numbers, items, queries[i].options)
            if attempt < _TRIES - 1 and len(valid) < len(one.numbers):
                incomplete.append(i)
            else:
                results[i] = one.result(valid, fetch_ms)
        waiting = incomplete
        if not waiting:
            break
        follower.catch_up(always=True)
    return [results[i] for i in range(len(queries))]


def _meant(query: Query) -> Query:
    """The query with its filters' labels as items have them."""
    options = query.options
    filters = options.filters.meant()
    if filters is options.filters:
        return query
    return replace(query, options=replace(options, filters=filters))


def _valid(
    numbers: Sequence[int], items: Mapping[int, Item], options: Options
) -> Mapping[int, Item]:
    """Those of the items found that still exist, pass the filters and are of different people."""
    valid: dict[int, Item] = {}
    people: set[str] = set()
    for number in numbers:
        item = items.get(number)
        if item is None or not options.filters.passes(item):
            continue
        if options.group_by is not None and item.person_id is not None:
            if item.person_id in people:
                continue
            people.add(item.person_id)
        valid[number] = item
    return valid


@dataclass(frozen=True)
class _Chosen:
    """Places in `ranked` of the results, and the numbers of their items.

    unmodulated: their part distances without γ and β, where asked to explain.
    """

    ranked: Ranked
    places: list[int]
    numbers: list[int]
    unmodulated: npt.NDArray[np.float32] | None

    def result(self, items: Mapping[int, Item], fetch_ms: float) -> SearchResult:
        """The answer, with those of its items that are given."""
        ranked = self.ranked
        found = [
            (index, items[number]) for index, number in enumerate(self.numbers) if number in items
        ]
        return SearchResult(
            hits=[
                self._hit(index, rank, item) for rank, (index, item) in enumerate(found, start=1)
            ],
            searched=ranked.searched,
            people=ranked.people,
            probability_enrolled=ranked.enrolled,
            candidates=ranked.candidates,
            exhaustive=ranked.exhaustive,
            timings_ms=ranked.timings_ms | {"fetch": fetch_ms},
            shards_ok=None if ranked.shards is None else ranked.shards.answered,
            shards_total=None if ranked.shards is None else ranked.shards.total,
        )

    def _hit(self, index: int, rank: int, item: Item) -> Hit:
        ranked, place = self.ranked, self.places[index]
        recalled, plain, parts = ranked.recall_ranks, ranked.unmodulated_ranks, ranked.parts
        explained = plain is not None
        probabilities, unmodulated = ranked.probabilities, self.unmodulated
        return Hit(
            rank=rank,
            item=item,
            score=float(ranked.scores[place]),
            distance=float(ranked.distances[place]),
            probability=None if probabilities is None else float(probabilities[place]),
            recall_rank=None if recalled is None else int(recalled[place]),
            unmodulated_rank=None if plain is None else int(plain[place]),
            rank_before_rerank=int(ranked.scored_ranks[place]) if explained else None,
            parts=parts[place].tolist() if explained and parts is not None else None,
            unmodulated_parts=None if unmodulated is None else unmodulated[index].tolist(),
        )


def _out_of_use(follower: Follower, items: Iterable[Item]) -> bool:
    """Whether the items belong to another version by now, and this one is retired.

    A version that is still being built also finds items of the one in use, by its own features.
    """
    mine = follower.info.fingerprint
    if all(item.model == mine for item in items):
        return False
    return follower.store.versions.state(mine) == "retired"


def _search(follower: Follower, queries: Sequence[Query], candidates: int) -> list[_Chosen]:
    """What the shard ranked, best first, and the places in it of the results."""
    chosen: dict[int, _Chosen] = {}
    options = [query.options for query in queries]
    waiting = {i: max(o.top_k, o.candidates or candidates) for i, o in enumerate(options)}
    while waiting:
        ranked = follower.shard.rank(
            [
                (_sought(queries[i], shortlist, candidates), queries[i].scale)
                for i, shortlist in waiting.items()
            ]
        )
        growing = {}
        for (i, shortlist), one in zip(waiting.items(), ranked, strict=True):
            places = _places(one, options[i])
            if places is None:
                growing[i] = shortlist * _WIDEN_FOR_GROUPS
                continue
            most = options[i].max_distance
            if most is not None:
                places = [place for place in places if one.distances[place] <= most]
            explained = options[i].explain and bool(places)
            parts = one.unmodulated_parts(queries[i].x, places) if explained else None
            chosen[i] = _Chosen(one, places, one.numbers[places].tolist(), parts)
        waiting = growing
    return [chosen[i] for i in range(len(queries))]


def _sought(query: Query, shortlist: int, candidates: int) -> SearchRequest:
    options = query.options
    return SearchRequest(
        query.x,
        query.modulation or Modulation.identity(1, query.x.shape[1]),
        count=shortlist,  # the whole of it has a part in the probabilities
        shortlist=shortlist,
        exhaustive=options.exhaustive,
        filters=options.filters,
        explain=options.explain,
        counted=options.candidates or candidates,
    )


def _places(ranked: Ranked, options: Options) -> list[int] | None:
    """The places of the results; None where a longer shortlist is needed to know."""
    if options.group_by is None:
        return list(range(min(options.top_k, len(ranked.numbers))))
    # `ranked` is sorted, so the first of each group is its best.
    _, first = np.unique(ranked.groups, return_index=True)
    certain = first[first < ranked.certain]
    if len(certain) < min(options.top_k, ranked.people):
        return None
    places: list[int] = np.sort(certain)[: options.top_k].tolist()
    return places
