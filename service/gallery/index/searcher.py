"""Queries through both stages; those of one call run as one.

A search holds no lock: it sees the rows that were there when its batch began.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import CMTConfig, Modulation, project
from service.gallery.index.columns import Columns
from service.gallery.index.exact_topk import Nearest, nearest_of
from service.gallery.index.inner_products import Best, Mask, exhaustive
from service.gallery.index.recall import recall
from service.gallery.index.segment import Segment
from service.gallery.records import Filters

# Where the bound on rounding says that an exhaustive search may have lost a row, it is repeated in
# fp32 for this many times as many rows.
_WIDEN_SHORTLIST = 8
SAMPLE = 1024  # rows whose distances say how those of all that is searched are spread
# A product of larger numbers could overflow fp32.
_LARGEST = 1e9


@dataclass(frozen=True)
class SearchRequest:
    """What one query wants: the `count` nearest to x (P×D) under γ, β (1×D).

    shortlist: how many the recall stage finds, at least `count`. exhaustive: of all rows, proven
    against rounding, else of those that recall finds. explain: with unmodulated distances too.
    sample: with the distances to a sample of all that is searched.
    """

    x: Tensor
    modulation: Modulation
    count: int
    shortlist: int
    exhaustive: bool = False
    filters: Filters = field(default_factory=Filters)
    explain: bool = False
    sample: bool = False


class Distances(NamedTuple):
    """Rows by position, and a query's distances to them."""

    positions: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]


class Unmodulated(NamedTuple):
    """Numbers that rank like the distance without γ and β: of N rows, and of all scored, sorted."""

    mine: npt.NDArray[np.floating]
    everyone: npt.NDArray[np.floating]


@dataclass(frozen=True)
class Scored:
    """The nearest, N rows, nearest first.

    numbers: row numbers. positions: in the `segment`. persons: codes, negative where there is none.
    parts: squared distances, N×P. searched: how many rows passed the filters. candidates: how many
    of them the answer was chosen from. sample: of the rows searched, all of them where they are no
    more than `SAMPLE`. recall_ms: of the whole batch.
    """

    numbers: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    persons: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]
    recall_ranks: npt.NDArray[np.int64] | None
    unmodulated: Unmodulated | None
    parts: npt.NDArray[np.float32] | None
    searched: int
    candidates: int
    exhaustive: bool
    sample: Distances | None
    recall_ms: float
    rescore_ms: float
    segment: Segment
    columns: Columns
    allowed: Mask


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
class _Found:
    """Candidates of one query, among the rows that it saw.

    exact: their scores are those of fp32, off by `rounding_bound` at most. approximate: they are
    farther off, as an index of codes or of some lists gives them.
    """

    segment: Segment
    columns: Columns
    allowed: Mask
    searched: int
    best: Best
    exact: bool = True
    approximate: bool = False


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
        checked = self._checked(queries)
        cosine = self._config.metric == "cosine"
        scored: dict[int, Scored] = {}
        # What an index finds for a shortlist depends on its length: only equal ones run together.
        kinds: dict[int | None, list[int]] = {}
        for i, one in enumerate(queries):
            kinds.setdefault(None if one.exhaustive or cosine else one.shortlist, []).append(i)
        for shortlist, members in kinds.items():
            whole = shortlist is None
            chosen = [checked[i] for i in members]
            started = time.perf_counter()
            found = self._exhaustive(chosen) if whole else self._recall(chosen)
            recall_ms = 1e3 * (time.perf_counter() - started)
            for i, query, candidates in zip(members, chosen, found, strict=True):
                scored[i] = self._scored(query, candidates, whole, recall_ms)
        return [scored[i] for i in range(len(queries))]

    def _scored(self, query: _Query, found: _Found, exhaustive: bool, recall_ms: float) -> Scored:
        started = time.perf_counter()
        request = query.request
        candidates = found.searched if exhaustive else len(found.best.positions)
        nearest = self._computed(query, found, exhaustive)
        count = request.count
        while exhaustive and not nearest.proven:
            count = min(found.searched, _WIDEN_SHORTLIST * count)
            self._count(widened=1)
            (found,) = self._exhaustive([query], count=count, exact=True)
            nearest = self._computed(query, found, exhaustive)
        found = replace(found, best=nearest.best)
        distances, parts = nearest.distances, nearest.parts

        positions = found.best.positions
        numbers = found.columns.numbers[positions]
        order = np.lexsort((numbers, distances))[: request.count]
        return Scored(
            numbers=numbers[order],
            positions=positions[order],
            persons=found.columns.persons[positions[order]],
            distances=distances[order],
            recall_ranks=None if exhaustive else order + 1,
            unmodulated=(
                self._unmodulated(query, found, exhaustive, order) if request.explain else None
            ),
            parts=None if parts is None else parts[order],
            searched=found.searched,
            candidates=candidates,
            exhaustive=exhaustive,
            sample=self._sample(query, found) if request.sample and found.searched else None,
            recall_ms=recall_ms,
            rescore_ms=1e3 * (time.perf_counter() - started),
            segment=found.segment,
            columns=found.columns,
            allowed=found.allowed,
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
        x = torch.stack([one.x.detach().cpu().double() for one in queries])
        gamma, beta = (
            torch.cat([one.modulation[i].detach().cpu().double() for one in queries])
            for i in range(2)
        )
        # A comparison with NaN is false.
        if not all(bool(v.abs().max() < _LARGEST) for v in (x, gamma, beta)):
            raise ValueError(
                "x, γ or β holds numbers that are not finite, or far too large; the checkpoint is "
                "damaged or untrained"
            )
        w, c = project(x, Modulation(gamma, beta))
        return [
            _Query(one, x[q], Modulation(gamma[q : q + 1], beta[q : q + 1]), w[q], float(c[q]))
            for q, one in enumerate(queries)
        ]

    def _recall(self, queries: Sequence[_Query]) -> list[_Found]:
        seen = self._seen(queries)
        segment = seen[0].segment
        w = torch.stack([query.w for query in queries])
        masks = [found.allowed for found in seen]
        shortlist = queries[0].request.shortlist  # the same for all of them
        best = recall(segment.features, segment.index, w, shortlist, masks)
        asked = sum(found.searched > 0 for found in seen)
        self._count(recall_calls=asked, recall_batches=asked > 0, largest_batch=asked)
        approximate = segment.index is not None
        return [
            replace(found, best=one, approximate=approximate)
            for found, one in zip(seen, best, strict=True)
        ]

    def _exhaustive(
        self, queries: Sequence[_Query], *, count: int = 0, exact: bool = False
    ) -> list[_Found]:
        """count: how many are wanted where it is more than the queries say. exact: not in bf16."""
        seen = self._seen(queries)
        features = seen[0].segment.features
        asked = sum(found.searched > 0 for found in seen)
        self._count(exhaustive_calls=asked, exhaustive_batches=asked > 0, largest_batch=asked)
        if features.metric == "cosine":  # no single inner product
            return [
                replace(found, best=_by_cosine(found, query))
                for found, query in zip(seen, queries, strict=True)
            ]
        w = torch.stack([query.w for query in queries])
        count = max(count, *(query.request.count for query in queries))
        best, exact = exhaustive(features, w, count, [one.allowed for one in seen], exact=exact)
        return [
            replace(found, best=one, exact=exact) for found, one in zip(seen, best, strict=True)
        ]

    def _seen(self, queries: Sequence[_Query]) -> list[_Found]:
        """What each query may see, before anything is found; the same mask for equal filters."""
        segment = self._segment()
        columns = segment.columns.frozen()
        filters = {query.request.filters for query in queries}
        masks = {one: columns.mask(one) for one in filters}
        counts = {one: int(np.count_nonzero(mask)) for one, mask in masks.items()}
        nothing = Best(np.empty(0, np.int64), np.empty(0, np.float32))
        return [
            _Found(segment, columns, masks[one], counts[one], nothing)
            for one in (query.request.filters for query in queries)
        ]

    def _computed(self, query: _Query, found: _Found, exhaustive: bool) -> Nearest:
        """Exact distances of what was found: as many as prove the nearest that are wanted.

        All of them where an index's scores are approximate, or where unmodulated ranks are wanted,
        which are places among the whole shortlist.
        """
        self._count(rescore_calls=found.searched > 0)
        features, best = found.segment.features, found.best
        if not exhaustive and (found.approximate or query.request.explain):
            distances, parts = features.rescore(query.x, query.modulation, best.positions)
            return Nearest(best, distances, parts, proven=True)
        return nearest_of(
            features,
            query.x,
            query.modulation,
            (query.w, query.c),
            best,
            searched=found.searched,
            count=query.request.count,
            exact=found.exact,
        )

    def _unmodulated(
        self, query: _Query, found: _Found, exhaustive: bool, order: npt.NDArray[np.int64]
    ) -> Unmodulated:
        """Of the rows of `found` in this order, and of all that was scored."""
        plain = Modulation.identity(1, query.x.shape[1], dtype=torch.float64)
        features, positions = found.segment.features, found.best.positions
        if not exhaustive:
            distances, _ = features.rescore(query.x, plain, positions)
            return Unmodulated(distances[order], np.sort(distances))
        scores = features.score_all(query.x, plain)
        everyone = np.sort(scores[: len(found.allowed)][found.allowed])
        return Unmodulated(scores[positions[order]], everyone)

    def _sample(self, query: _Query, found: _Found) -> Distances:
        """Evenly spread over the rows searched: the same for all queries with these filters."""
        positions = np.flatnonzero(found.allowed)
        if len(positions) > SAMPLE:
            positions = positions[np.arange(SAMPLE) * len(positions) // SAMPLE]
        features = found.segment.features
        return Distances(positions, features.distances(query.x, query.modulation, positions))

    def _count(self, *, largest_batch: int = 0, **calls: int) -> None:
        with self._counting:
            for name, count in calls.items():
                setattr(self.counters, name, getattr(self.counters, name) + count)
            self.counters.largest_batch = max(self.counters.largest_batch, largest_batch)


def _by_cosine(found: _Found, query: _Query) -> Best:
    """The nearest allowed rows, and all at the same distance as the last."""
    scores = found.segment.features.score_all(query.x, query.modulation)
    scores = scores[: len(found.allowed)]
    positions = np.flatnonzero(found.allowed)
    near = scores[positions]
    if query.request.count < len(positions):
        last = np.partition(near, query.request.count - 1)[query.request.count - 1]
        # float64 may round slightly differently in another block.
        positions = positions[near <= last + 1e-12]
    return Best(positions, -scores[positions].astype(np.float32))
