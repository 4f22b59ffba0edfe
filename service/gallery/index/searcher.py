"""Queries through both stages; those of one call run as one.

A search holds no lock: it sees the rows that were there when its batch began.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import CMTConfig, Modulation, project
from model.modulation import lifted_distances
from service.gallery.index.chunks import Mask
from service.gallery.index.columns import Columns
from service.gallery.index.exact_topk import Nearest, first_rows, nearest_of
from service.gallery.index.features import Features, Measured
from service.gallery.index.inner_products import Best, exhaustive, scan
from service.gallery.index.recall import recall
from service.gallery.index.segment import Segment
from service.gallery.records import Filters

T = TypeVar("T")

# Where the bound on rounding says that an exhaustive search may have lost a row, it is repeated in
# fp32 for this many times as many rows.
_WIDEN_SHORTLIST = 8
# Where no more rows than this are searched, the distances to all of them are found with the best.
WHOLE = 4096
SAMPLE = 1024  # of more, rows whose distances say how those of all are spread
# A product of larger numbers could overflow fp32.
_LARGEST = 1e9


@dataclass(frozen=True)
class SearchRequest:
    """What one query wants: the `count` nearest to x (P×D) under γ, β (1×D).

    shortlist: how many the recall stage finds, at least `count`. exhaustive: of all rows, proven
    against rounding, else of those that recall finds. explain: with unmodulated distances too.
    sample: with the distances to a sample of all that is searched. counted: how many of the
    shortlist probabilities and re-ranking go by, see `ranker`.
    """

    x: Tensor
    modulation: Modulation
    count: int
    shortlist: int
    exhaustive: bool = False
    filters: Filters = field(default_factory=Filters)
    explain: bool = False
    sample: bool = False
    counted: int | None = None


class Sample(NamedTuple):
    """Rows by position, whose they are, and a query's distances to them.

    whole: they are all that is searched.
    """

    positions: npt.NDArray[np.int64]
    persons: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]
    whole: bool


class Population(Protocol):
    """What ranking asks of the rows that pass some filters, of which there are `searched`.

    features: of them, by position. persons: whether a row shows a person, by the person's code.
    unlabelled: how many show nobody known.
    """

    @property
    def searched(self) -> int: ...
    @property
    def features(self) -> Features: ...
    @property
    def persons(self) -> npt.NDArray[np.bool_]: ...
    @property
    def unlabelled(self) -> int: ...


class Unmodulated(NamedTuple):
    """Numbers that rank like the distance without γ and β: of N rows, and of all scored, sorted."""

    mine: npt.NDArray[np.floating]
    everyone: npt.NDArray[np.floating]


@dataclass(frozen=True)
class Scored:
    """The nearest, N rows, nearest first.

    numbers: row numbers. positions: in the `segment`. persons: codes, negative where there is none.
    scores: what recall ordered them by, see `Best`. parts: squared distances, N×P. seen: what
    passed the filters. candidates: how many rows the answer was chosen from. sample: of those
    searched, good to the rounding of fp32. recall_ms: of the whole batch.
    """

    numbers: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    persons: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float32]
    recall_ranks: npt.NDArray[np.int64] | None
    unmodulated: Unmodulated | None
    parts: npt.NDArray[np.float32] | None
    candidates: int
    exhaustive: bool
    sample: Sample | None
    recall_ms: float
    rescore_ms: float
    seen: Population

    @property
    def searched(self) -> int:
        """How many rows passed the filters."""
        return self.seen.searched


@dataclass
class Counters:
    """How often each stage ran since the gallery was opened: per query and gallery modality.

    recall_batches, exhaustive_batches: how often queries of one call were run together.
    widened: exhaustive searches that had to be repeated for more rows, to be sure.
    """

    recall_calls: int = 0
    rescore_calls: int = 0
    recall_batches: int = 0
    exhaustive_calls: int = 0
    exhaustive_batches: int = 0
    largest_batch: int = 0
    widened: int = 0


@dataclass(frozen=True)
class _Query:
    """x P×D with γ, β 1×D and their w (P+1)·D, c: float64 on the CPU."""

    request: SearchRequest
    x: Tensor
    modulation: Modulation
    w: Tensor
    c: float


@dataclass(frozen=True)
class Seen:
    """The rows that pass some filters at one moment.

    facts: what was computed of them, kept until something changes: see `Columns.facts`. few: the
    filters leave out no more than a modality, so that most searches see the same rows.
    """

    segment: Segment
    columns: Columns
    allowed: Mask
    facts: dict[str, Any]
    few: bool

    @classmethod
    def by(cls, segment: Segment, columns: Columns, filters: Filters) -> Seen:
        """What a query with these filters may see. columns: a view of the segment's."""
        few = filters == Filters(gallery_modality=filters.gallery_modality)
        return cls(segment, columns, columns.mask(filters), columns.facts(filters), few)

    @property
    def searched(self) -> int:
        """How many they are."""
        return self._once("searched", lambda: int(np.count_nonzero(self.allowed)))

    @property
    def features(self) -> Features:
        """Of all rows, by position."""
        return self.segment.features

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Where they are."""
        return np.flatnonzero(self.allowed)

    @property
    def spread(self) -> npt.NDArray[np.int64]:
        """`SAMPLE` of them, or all, evenly spread: the same for every query.

        By their numbers alone, so that a gallery in several shards takes the same.
        """
        return self._once("spread", self._spread)

    @property
    def lifted(self) -> Tensor:
        """`spread` as `lifted_distances` needs it."""
        if self.few:  # of these there are two or three, of others any number
            return self._once("lifted", lambda: self.features.lifted_on_host(self.spread))
        return self.features.lifted_on_host(self.spread)

    @property
    def persons(self) -> npt.NDArray[np.bool_]:
        """Whether they show a person, by the person's code, up to the largest of theirs."""
        return self._once("persons", self._persons)

    @property
    def unlabelled(self) -> int:
        """How many show nobody known."""
        return self._once("unlabelled", lambda: int(np.count_nonzero(self._codes() < 0)))

    def _spread(self) -> npt.NDArray[np.int64]:
        if self.searched <= SAMPLE:
            return self.positions
        keys = scattered(self.columns.numbers[self.positions])
        # About twice as many as are wanted have a key up to this one.
        near = np.flatnonzero(keys <= np.uint64(min(2**65 // self.searched * SAMPLE, 2**64 - 1)))
        if len(near) < SAMPLE:
            near = np.arange(len(keys))
        first = near[np.argpartition(keys[near], SAMPLE - 1)[:SAMPLE]]
        return self.positions[np.sort(first)]

    def _persons(self) -> npt.NDArray[np.bool_]:
        codes = self._codes()
        shown = np.zeros(codes.max(initial=-1) + 2, np.bool_)
        shown[codes] = True  # the last place is for −1
        return shown[:-1]

    def _codes(self) -> npt.NDArray[np.int64]:
        return self.columns.persons[: len(self.allowed)][self.allowed]

    def _once(self, name: str, compute: Callable[[], T]) -> T:
        found: T | None = self.facts.get(name)
        if found is None:
            found = self.facts[name] = compute()
        return found


@dataclass(frozen=True)
class _Found:
    """Candidates of one query, among the rows that it saw.

    exact: their scores are those of fp32, off by `rounding_bound` at most. approximate: they are
    farther off, as an index of codes or of some lists gives them. sample: see `Scored`.
    """

    seen: Seen
    best: Best
    exact: bool = True
    approximate: bool = False
    sample: Sample | None = None


class _Kind(NamedTuple):
    """Queries that are run together. whole: all rows are scored, and kept as a sample."""

    exhaustive: bool
    whole: bool
    shortlist: int | None


class Searcher:
    """Searches what `segment` says is current. Thread-safe."""

    def __init__(self, config: CMTConfig, segment: Callable[[], Segment]) -> None:
        self._config, self._segment = config, segment
        self.counters = Counters()
        self._counting = threading.Lock()

    @torch.inference_mode()
    def search(self, queries: Sequence[SearchRequest]) -> list[Scored]:
        """Each query's `count` nearest, or all there are; those of one kind run as one.

        All distances returned are computed directly in float64; items at equal distance are in
        order of their numbers. No answer depends on the other queries. Raises ValueError for a
        query of the wrong shape or with numbers that are not finite, and for a count below 1.
        """
        checked, seen = self._checked(queries), self._seen(queries)
        scored: dict[int, Scored] = {}
        # What an index finds for a shortlist depends on its length: only equal ones run together.
        kinds: dict[_Kind, list[int]] = {}
        for i, one in enumerate(queries):
            kind = self._kind(one, seen[i])
            if seen[i].searched:
                kinds.setdefault(kind, []).append(i)
            else:  # as a modality of which nothing is enrolled, which most queries meet
                scored[i] = _nothing(one, seen[i], kind.exhaustive)
        for kind, members in kinds.items():
            started = time.perf_counter()
            found = self._found(kind, [checked[i] for i in members], [seen[i] for i in members])
            recall_ms = 1e3 * (time.perf_counter() - started)
            asked = [checked[i] for i in members]
            samples, first = _sampled(asked, found), _together(asked, found, kind.exhaustive)
            for i, candidates, sample, mine in zip(members, found, samples, first, strict=True):
                scored[i] = self._scored(
                    checked[i], candidates, sample, mine, kind.exhaustive, recall_ms
                )
        return [scored[i] for i in range(len(queries))]

    def _kind(self, query: SearchRequest, seen: Seen) -> _Kind:
        cosine = self._config.metric == "cosine"
        exhaustive = query.exhaustive or cosine
        whole = query.sample and seen.searched <= WHOLE and not cosine
        return _Kind(exhaustive, whole, None if whole or exhaustive else query.shortlist)

    def _scored(
        self,
        query: _Query,
        found: _Found,
        sample: Sample | None,
        first: Measured | None,
        exhaustive: bool,
        recall_ms: float,
    ) -> Scored:
        started = time.perf_counter()
        request, seen = query.request, found.seen
        candidates = min(request.shortlist, len(found.best.positions))
        nearest = self._computed(query, found, exhaustive, first)
        count = request.count
        while exhaustive and not nearest.proven:
            count = min(seen.searched, _WIDEN_SHORTLIST * count)
            self._count(widened=1)
            (found,) = self._exhaustive([query], [seen], count=count, exact=True)
            nearest = self._computed(query, found, exhaustive)
        found = replace(found, best=nearest.best)
        distances, parts = nearest.distances, nearest.parts

        positions = found.best.positions
        numbers = seen.columns.numbers[positions]
        order = np.lexsort((numbers, distances))[: request.count]
        return Scored(
            numbers=numbers[order],
            positions=positions[order],
            persons=seen.columns.persons[positions[order]],
            distances=distances[order],
            scores=found.best.scores[order],
            recall_ranks=None if exhaustive else order + 1,
            unmodulated=(
                self._unmodulated(query, found, exhaustive, order) if request.explain else None
            ),
            parts=None if parts is None else parts[order],
            candidates=seen.searched if exhaustive else candidates,
            exhaustive=exhaustive,
            sample=sample,
            recall_ms=recall_ms,
            rescore_ms=1e3 * (time.perf_counter() - started),
            seen=seen,
        )

    def _checked(self, queries: Sequence[SearchRequest]) -> list[_Query]:
        parts, dim = self._config.parts, self._config.dim
        for one in queries:
            if one.count < 1:
                raise ValueError(f"a search needs room for at least one result, not {one.count}")
            if tuple(one.x.shape) != (parts, dim):
                raise ValueError(
                    f"x has the shape {tuple(one.x.shape)}; this gallery needs {parts, dim}"
                )
            if any(tuple(p.shape) != (1, dim) for p in one.modulation):
                shapes = " and ".join(str(tuple(p.shape)) for p in one.modulation)
                raise ValueError(f"γ and β have the shapes {shapes}; one query needs {1, dim}")
        given = torch.empty(len(queries), parts + 2, dim, dtype=torch.float64)
        for place, one in zip(given, queries, strict=True):
            place[:parts], place[parts:-1], place[-1:] = one.x, *one.modulation
        x, gamma, beta = given[:, :parts], given[:, -2], given[:, -1]
        # A comparison with NaN is false.
        if not np.abs(given.numpy()).max() < _LARGEST:
            raise ValueError(
                "x, γ or β holds numbers that are not finite, or far too large; the checkpoint is "
                "damaged or untrained"
            )
        w, c = project(x, Modulation(gamma, beta))
        return [
            _Query(one, x[q], Modulation(gamma[q : q + 1], beta[q : q + 1]), w[q], float(c[q]))
            for q, one in enumerate(queries)
        ]

    def _found(self, kind: _Kind, queries: Sequence[_Query], seen: Sequence[Seen]) -> list[_Found]:
        asked = len(queries)
        if kind.exhaustive:
            self._count(exhaustive_calls=asked, exhaustive_batches=1, largest_batch=asked)
        else:
            self._count(recall_calls=asked, recall_batches=1, largest_batch=asked)
        if kind.whole:
            return self._whole(queries, seen, exhaustive=kind.exhaustive)
        if kind.shortlist is None:
            return self._exhaustive(queries, seen)
        segment = seen[0].segment
        w = torch.stack([query.w for query in queries])
        masks = [one.allowed for one in seen]
        best = recall(segment.features, segment.index, w, kind.shortlist, masks)
        by_index = segment.index is not None
        return [
            _Found(rows, one, approximate=by_index or one.coarse)
            for rows, one in zip(seen, best, strict=True)
        ]

    def _whole(
        self, queries: Sequence[_Query], seen: Sequence[Seen], *, exhaustive: bool
    ) -> list[_Found]:
        """As recall and exhaustive search find them; one scan gives the distances to all, too."""
        w = torch.stack([query.w for query in queries])
        best = scan(seen[0].segment.features, w, WHOLE, [one.allowed for one in seen])
        found = []
        for query, rows, one in zip(queries, seen, best, strict=True):
            squared = query.c - one.scores.astype(np.float64)
            persons = rows.columns.persons[one.positions]
            sample = Sample(one.positions, persons, np.sqrt(np.maximum(squared, 0)), whole=True)
            kept = one if exhaustive else one.first(query.request.shortlist)
            found.append(_Found(rows, kept, sample=sample))
        return found

    def _exhaustive(
        self,
        queries: Sequence[_Query],
        seen: Sequence[Seen],
        *,
        count: int = 0,
        exact: bool = False,
    ) -> list[_Found]:
        """count: how many are wanted where it is more than the queries say. exact: not in bf16."""
        features = seen[0].segment.features
        if features.metric == "cosine":  # no single inner product
            return [_by_cosine(query, rows) for query, rows in zip(queries, seen, strict=True)]
        w = torch.stack([query.w for query in queries])
        count = max(count, *(query.request.count for query in queries))
        best, exact = exhaustive(features, w, count, [one.allowed for one in seen], exact=exact)
        return [_Found(rows, one, exact=exact) for rows, one in zip(seen, best, strict=True)]

    def _seen(self, queries: Sequence[SearchRequest]) -> list[Seen]:
        """What each query may see, before anything is found; the same for equal filters."""
        segment = self._segment()
        columns = segment.columns.frozen()
        wanted = {query.filters for query in queries}
        seen = {filters: Seen.by(segment, columns, filters) for filters in wanted}
        return [seen[query.filters] for query in queries]

    def _computed(
        self, query: _Query, found: _Found, exhaustive: bool, first: Measured | None = None
    ) -> Nearest:
        """Exact distances of what was found: as many as prove the nearest that are wanted.

        first: those of `_first_rows`, where they are known.
        """
        self._count(rescore_calls=1)
        features, best = found.seen.segment.features, found.best
        if _all_computed(query, found, exhaustive):
            distances, parts = first or features.rescore(query.x, query.modulation, best.positions)
            found_all = Nearest(best, distances, parts, proven=True)
            return _shortest(query, found_all) if best.coarse else found_all
        return nearest_of(
            features,
            query.x,
            query.modulation,
            (query.w, query.c),
            best,
            searched=found.seen.searched,
            count=query.request.count,
            exact=found.exact,
            first=first,
        )

    def _unmodulated(
        self, query: _Query, found: _Found, exhaustive: bool, order: npt.NDArray[np.int64]
    ) -> Unmodulated:
        """Of the rows of `found` in this order, and of all that was scored."""
        plain = Modulation.identity(1, query.x.shape[1], dtype=torch.float64)
        features, positions = found.seen.segment.features, found.best.positions
        if not exhaustive:
            distances, _ = features.rescore(query.x, plain, positions)
            return Unmodulated(distances[order], np.sort(distances))
        scores = features.score_all(query.x, plain)
        everyone = np.sort(scores[found.seen.positions])
        return Unmodulated(scores[positions[order]], everyone)

    def _count(self, *, largest_batch: int = 0, **calls: int) -> None:
        with self._counting:
            for name, count in calls.items():
                setattr(self.counters, name, getattr(self.counters, name) + count)
            self.counters.largest_batch = max(self.counters.largest_batch, largest_batch)


def scattered(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Keys of row numbers, all different; those of successive numbers are far from each other.

    The fraction of a multiple of √2, whose successive values are spread evenly (Weyl).
    """
    return numbers.astype(np.uint64) * np.uint64(0x6A09E667F3BCC909)


def _nothing(request: SearchRequest, seen: Seen, exhaustive: bool) -> Scored:
    """What a search finds where no row passes its filters."""
    features, none = seen.features, np.empty(0, np.int64)
    numbers, scores = np.empty(0), np.empty(0, np.float32)
    parts = np.empty((0, features.parts), np.float32)
    return Scored(
        numbers=none,
        positions=none,
        persons=none,
        distances=numbers,
        scores=scores,
        recall_ranks=None if exhaustive else none,
        unmodulated=Unmodulated(numbers, numbers) if request.explain else None,
        parts=None if features.metric == "cosine" else parts,
        candidates=0,
        exhaustive=exhaustive,
        sample=Sample(none, none, numbers, whole=True) if request.sample else None,
        recall_ms=0.0,
        rescore_ms=0.0,
        seen=seen,
    )


def _sampled(queries: Sequence[_Query], found: Sequence[_Found]) -> list[Sample | None]:
    """What each query wants of it; the same rows for those with the same filters, read once."""
    samples = [one.sample for one in found]
    wanting: dict[int, list[int]] = {}
    for i, one in enumerate(found):
        if queries[i].request.sample and samples[i] is None and one.seen.searched:
            wanting.setdefault(id(one.seen), []).append(i)
    for members in wanting.values():
        seen = found[members[0]].seen
        persons, lifted = seen.columns.persons[seen.spread], seen.lifted
        for i in members:
            distances = lifted_distances(queries[i].w, queries[i].c, lifted)
            samples[i] = Sample(seen.spread, persons, distances, whole=False)
    return samples


def _all_computed(query: _Query, found: _Found, exhaustive: bool) -> bool:
    """Whether an index's scores are approximate, or the whole shortlist or its ranks are wanted."""
    request = query.request
    whole = request.explain or request.count >= len(found.best.positions)
    return not exhaustive and (found.approximate or whole)


def _shortest(query: _Query, nearest: Nearest) -> Nearest:
    """The shortlist among rows that codes found: of the best scores, which the distances give."""
    best, distances, parts, _ = nearest
    order = np.lexsort((best.positions, distances))[: query.request.shortlist]
    distances = distances[order]
    scores = (query.c - distances * distances).astype(np.float32)
    kept = Best(best.positions[order], scores)
    return Nearest(kept, distances, None if parts is None else parts[order], proven=True)


def _together(
    queries: Sequence[_Query], found: Sequence[_Found], exhaustive: bool
) -> Sequence[Measured | None]:
    """Exact distances of the rows that are computed first, for all queries by one launch.

    None where there is no such launch: each query's are computed then by themselves.
    """
    features = found[0].seen.segment.features
    if features.device.type == "cpu":
        return [None] * len(found)
    asked = []
    for query, one in zip(queries, found, strict=True):
        rows = one.best
        if not _all_computed(query, one, exhaustive):
            rows = first_rows(features, query.w, rows, query.request.count, exact=one.exact)
        asked.append((query.x, query.modulation, rows.positions))
    return features.rescore_together(asked) or [None] * len(found)


def _by_cosine(query: _Query, seen: Seen) -> _Found:
    """The nearest allowed rows, and all at the same distance as the last."""
    distances = seen.segment.features.score_all(query.x, query.modulation)
    positions = seen.positions
    near = distances[positions]
    if query.request.count < len(positions):
        last = np.partition(near, query.request.count - 1)[query.request.count - 1]
        # float64 may round slightly differently in another block.
        positions = positions[near <= last + 1e-12]
    best = Best(positions, -distances[positions].astype(np.float32))
    whole = seen.searched <= WHOLE
    places = seen.positions if whole else seen.spread
    measured = distances[places].astype(np.float64)
    sample = Sample(places, seen.columns.persons[places], measured, whole)
    return _Found(seen, best, sample=sample)
