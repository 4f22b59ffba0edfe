"""One query through both stages; queries of several threads run as one.

A search holds no lock: it sees the rows there were when its batch began.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import CMTConfig, Modulation, project
from service.gallery.columns import Columns
from service.gallery.nearest import Best, Mask, exhaustive
from service.gallery.proof import Nearest, nearest_of
from service.gallery.recall import recall
from service.gallery.records import Filters
from service.gallery.resident import Resident
from service.gallery.together import Together

# Where the bound on rounding says that an exhaustive search may have lost one, it searches again in
# fp32 for so many times as many.
_WIDEN = 8
# A product of larger numbers could leave fp32.
_LARGEST = 1e9


@dataclass(frozen=True)
class Scored:
    """What was rescored, nearest first, N rows. groups: equal where person_id is equal."""

    numbers: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]
    recall_ranks: npt.NDArray[np.int64] | None
    unmodulated_ranks: npt.NDArray[np.int64] | None
    parts: npt.NDArray[np.float32] | None
    searched: int
    exhaustive: bool
    recall_ms: float
    rescore_ms: float
    found: _Found

    def searched_groups(self) -> int:
        """How many groups there are among all that was searched."""
        columns, allowed = self.found.columns, self.found.allowed
        persons = columns.persons[: len(allowed)][allowed]
        named = persons >= 0
        return len(np.unique(persons[named])) + int(np.count_nonzero(~named))


@dataclass
class Counters:
    """How often each stage ran since the gallery was opened, one count per query.

    recall_batches, exhaustive_batches: how often the queries that had come together were run.
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
    """x P×D with γ, β 1×D, float64 on the CPU."""

    x: Tensor
    modulation: Modulation
    count: int
    filters: Filters
    exact: bool = False

    def project(self) -> tuple[Tensor, float]:
        w, c = project(self.x[None], self.modulation)
        return w[0], float(c[0])


@dataclass(frozen=True)
class _Found:
    """Candidates of one query, among the rows that it saw."""

    resident: Resident
    columns: Columns
    allowed: Mask
    searched: int
    best: Best
    exact: bool = True


class Searcher:
    """Searches what `resident` says is current. Thread-safe."""

    def __init__(self, config: CMTConfig, resident: Callable[[], Resident]) -> None:
        self._config, self._resident = config, resident
        self._recall = Together(self._run_recall)
        self._exhaustive = Together(self._run_exhaustive)
        self.counters = Counters()
        self._counting = threading.Lock()

    def search(
        self,
        x: Tensor,
        modulation: Modulation,
        shortlist: int,
        *,
        exhaustive: bool,
        filters: Filters,
        explain: bool,
    ) -> Scored:
        """One query x (P×D) with γ, β (1×D) → the `shortlist` nearest, or all there are.

        exhaustive: the nearest of all rows, proven against rounding, else of those that recall
        finds. Both ways the distances returned are computed directly in float64; items at equal
        distance are in order of their numbers. Raises ValueError for a query of the wrong shape
        or with numbers that are not finite, and for a shortlist below 1.
        """
        query = self._checked(x, modulation, shortlist, filters)
        started = time.perf_counter()
        exhaustive = exhaustive or self._config.metric == "cosine"
        found = self._exhaustive(query) if exhaustive else self._recall(query)
        recalled = time.perf_counter()
        nearest = self._computed(query, found, exhaustive, shortlist)
        while not nearest.proven:
            wider = min(found.searched, _WIDEN * query.count)
            query = replace(query, count=wider, exact=True)
            self._count(widened=1)
            found = self._exhaustive(query)
            nearest = self._computed(query, found, exhaustive, shortlist)
        found = replace(found, best=nearest.best)
        distances, parts = nearest.distances, nearest.parts

        positions = found.best.positions
        numbers = found.columns.numbers[positions]
        persons = found.columns.persons[positions]
        order = np.lexsort((numbers, distances))[:shortlist]
        unmodulated = None
        if explain:
            unmodulated = self._unmodulated_ranks(query, found, exhaustive)[order]
        return Scored(
            numbers=numbers[order],
            groups=np.where(persons < 0, -1 - numbers, persons)[order],
            distances=distances[order],
            recall_ranks=None if exhaustive else order + 1,
            unmodulated_ranks=unmodulated,
            parts=None if parts is None else parts[order],
            searched=found.searched,
            exhaustive=exhaustive,
            recall_ms=1e3 * (recalled - started),
            rescore_ms=1e3 * (time.perf_counter() - recalled),
            found=found,
        )

    def _checked(
        self, x: Tensor, modulation: Modulation, shortlist: int, filters: Filters
    ) -> _Query:
        parts, dim = self._config.parts, self._config.dim
        if shortlist < 1:
            raise ValueError(f"a search needs room for at least one result, not {shortlist}")
        if tuple(x.shape) != (parts, dim):
            raise ValueError(f"x has the shape {tuple(x.shape)}; this gallery needs {parts, dim}")
        if any(tuple(p.shape) != (1, dim) for p in modulation):
            shapes = " and ".join(str(tuple(p.shape)) for p in modulation)
            raise ValueError(f"γ and β have the shapes {shapes}; one query needs {1, dim}")
        x = x.detach().cpu().double()
        modulation = Modulation(*(p.detach().cpu().double() for p in modulation))
        # A comparison with NaN is false.
        if not all(bool((v.abs() < _LARGEST).all()) for v in (x, *modulation)):
            raise ValueError(
                "x, γ or β holds numbers that are not finite, or far too large; the checkpoint is "
                "damaged or untrained"
            )
        return _Query(x, modulation, shortlist, filters)

    @torch.inference_mode()
    def _run_recall(self, queries: Sequence[_Query]) -> list[_Found]:
        seen = self._seen(queries)
        index = seen[0].resident.index
        w = torch.stack([query.project()[0] for query in queries])
        count = max(query.count for query in queries)
        features = seen[0].resident.features
        best = recall(features, index, w, count, [found.allowed for found in seen])
        self._count(recall_calls=len(queries), recall_batches=1, largest_batch=len(queries))
        return [
            replace(found, best=one.first(query.count))
            for found, one, query in zip(seen, best, queries, strict=True)
        ]

    @torch.inference_mode()
    def _run_exhaustive(self, queries: Sequence[_Query]) -> list[_Found]:
        seen = self._seen(queries)
        features = seen[0].resident.features
        self._count(exhaustive_calls=len(queries), exhaustive_batches=1, largest_batch=len(queries))
        if features.metric == "cosine":  # no single inner product
            return [
                replace(found, best=_by_cosine(found, query))
                for found, query in zip(seen, queries, strict=True)
            ]
        w = torch.stack([query.project()[0] for query in queries])
        count = max(query.count for query in queries)
        exact = any(query.exact for query in queries)
        best, exact = exhaustive(features, w, count, [one.allowed for one in seen], exact=exact)
        return [
            replace(found, best=one, exact=exact) for found, one in zip(seen, best, strict=True)
        ]

    def _seen(self, queries: Sequence[_Query]) -> list[_Found]:
        """What each query may see, before anything is found; the same mask for equal filters."""
        resident = self._resident()
        columns = resident.columns.frozen()
        masks = {query.filters: columns.mask(query.filters) for query in queries}
        counts = {filters: int(np.count_nonzero(mask)) for filters, mask in masks.items()}
        nothing = Best(np.empty(0, np.int64), np.empty(0, np.float32))
        return [
            _Found(resident, columns, masks[query.filters], counts[query.filters], nothing)
            for query in queries
        ]

    def _computed(self, query: _Query, found: _Found, exhaustive: bool, count: int) -> Nearest:
        """Exact distances of what was found; exhaustive: with the proof of the `count` nearest."""
        self._count(rescore_calls=1)
        features, best = found.resident.features, found.best
        if not exhaustive:
            distances, parts = features.rescore(query.x, query.modulation, best.positions)
            return Nearest(best, distances, parts, proven=True)
        return nearest_of(
            features,
            query.x,
            query.modulation,
            best,
            searched=found.searched,
            count=count,
            exact=found.exact,
        )

    def _unmodulated_ranks(
        self, query: _Query, found: _Found, exhaustive: bool
    ) -> npt.NDArray[np.int64]:
        """Place of each of `found` by the distance without γ and β, among what was scored."""
        plain = Modulation.identity(1, query.x.shape[1], dtype=torch.float64)
        features, positions = found.resident.features, found.best.positions
        if not exhaustive:
            distances, _ = features.rescore(query.x, plain, positions)
            return _ranks_among(distances, distances)
        scores = features.score_all(query.x, plain)
        return _ranks_among(scores[: len(found.allowed)][found.allowed], scores[positions])

    def _count(self, *, largest_batch: int = 0, **calls: int) -> None:
        with self._counting:
            for name, count in calls.items():
                setattr(self.counters, name, getattr(self.counters, name) + count)
            self.counters.largest_batch = max(self.counters.largest_batch, largest_batch)


def _by_cosine(found: _Found, query: _Query) -> Best:
    """The nearest allowed rows, and all at the same distance as the last."""
    scores = found.resident.features.score_all(query.x, query.modulation)
    scores = scores[: len(found.allowed)]
    positions = np.flatnonzero(found.allowed)
    near = scores[positions]
    if query.count < len(positions):
        last = np.partition(near, query.count - 1)[query.count - 1]
        # float64 rounds a little otherwise in another block.
        positions = positions[near <= last + 1e-12]
    return Best(positions, -scores[positions].astype(np.float32))


def _ranks_among(
    everyone: npt.NDArray[np.floating], chosen: npt.NDArray[np.floating]
) -> npt.NDArray[np.int64]:
    """1 + how many of `everyone` are smaller than each of `chosen`."""
    return np.searchsorted(np.sort(everyone), chosen, side="left") + 1
