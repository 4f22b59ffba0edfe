"""What the shards of a gallery tell of a query, and how it becomes what one shard would have found.

Each shard searches its own items exactly as a gallery of one process does (`Searcher`) and tells
its best with their distances, what recall ordered them by, and the features of the first ones.
Together they are what one process finds: the best of all are among the best of each, their
distances are the same numbers, and `ranker` then works on them with the same code. People are told
by keys that are equal in every shard, since a code is a shard's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import CMTConfig, Modulation, project
from model.modulation import lifted_distances
from service.gallery.index.features import Features
from service.gallery.index.searcher import (
    SAMPLE,
    WHOLE,
    Sample,
    Scored,
    SearchRequest,
    Seen,
    Unmodulated,
    scattered,
)

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """A `SearchRequest` with its numbers as arrays, which are sent as they lie in memory.

    kept: of so many of the best, a shard tells the features.
    """

    x: npt.NDArray[np.floating]
    gamma: npt.NDArray[np.floating]
    beta: npt.NDArray[np.floating]
    rest: SearchRequest
    kept: int

    @classmethod
    def of(cls, request: SearchRequest, kept: int) -> Question:
        """The question of a request."""
        x, (gamma, beta) = request.x, request.modulation
        nothing = torch.empty(0)
        return cls(
            *(x.detach().cpu().numpy(), gamma.detach().cpu().numpy(), beta.detach().cpu().numpy()),
            rest=replace(request, x=nothing, modulation=Modulation(nothing, nothing)),
            kept=request.count if request.explain else kept,
        )

    def request(self) -> SearchRequest:
        """What was asked."""
        x, gamma, beta = (torch.from_numpy(np.array(n)) for n in (self.x, self.gamma, self.beta))
        return replace(self.rest, x=x, modulation=Modulation(gamma, beta))


class Sampled(NamedTuple):
    """A sample by row number: whose the rows are, by person's key, and the distances to them."""

    numbers: Integers
    persons: Integers
    distances: Floats

    def taken(self, places: npt.NDArray[np.intp]) -> Sampled:
        """Some of its rows."""
        return Sampled(self.numbers[places], self.persons[places], self.distances[places])


@dataclass(frozen=True)
class Finding:
    """What one shard has found for a question: N rows, nearest first, as in `Scored`.

    persons: keys. features: fp16, of the first K rows. whole: the distances to all that the shard
    has, where they are few. spread: to its part of a sample of all. shown: keys of the people that
    it searched, in order. full: whether the shard lacks items for want of memory.
    """

    numbers: Integers
    persons: Integers
    distances: Floats
    scores: npt.NDArray[np.float32]
    unmodulated: Unmodulated | None
    parts: npt.NDArray[np.float32] | None
    features: npt.NDArray[np.float16]
    candidates: int
    exhaustive: bool
    whole: Sampled | None
    spread: Sampled | None
    searched: int
    unlabelled: int
    shown: Integers
    recall_ms: float
    rescore_ms: float
    full: bool


def findings(
    questions: Sequence[Question],
    requests: Sequence[SearchRequest],
    scored: Sequence[Scored],
    *,
    full: bool,
) -> list[Finding]:
    """What a shard tells of what its searcher has found. full: see `Finding`."""
    shown: dict[int, Integers] = {}
    found = []
    for question, request, one in zip(questions, requests, scored, strict=True):
        seen = one.seen
        assert isinstance(seen, Seen)
        if id(seen) not in shown:  # the same for equal filters
            keys = seen.columns.person_keys(np.flatnonzero(seen.persons))
            shown[id(seen)] = np.sort(keys)
        found.append(
            Finding(
                numbers=one.numbers,
                persons=seen.columns.person_keys(one.persons),
                distances=one.distances,
                scores=one.scores,
                unmodulated=one.unmodulated,
                parts=one.parts,
                features=_features_of(seen.features, one.positions[: question.kept]),
                candidates=one.candidates,
                exhaustive=one.exhaustive,
                whole=_sampled(seen, one.sample) if one.sample and one.sample.whole else None,
                spread=_spread(seen, request, one.sample),
                searched=one.searched,
                unlabelled=seen.unlabelled,
                shown=shown[id(seen)],
                recall_ms=one.recall_ms,
                rescore_ms=one.rescore_ms,
                full=full,
            )
        )
    return found


def _features_of(features: Features, positions: Integers) -> npt.NDArray[np.float16]:
    if not len(positions):
        return np.empty((0, features.parts * features.dim), np.float16)
    order = np.argsort(positions)
    return features.stored(positions[order])[np.argsort(order)]


def _sampled(seen: Seen, sample: Sample) -> Sampled:
    numbers = seen.columns.numbers[sample.positions]
    return Sampled(numbers, seen.columns.person_keys(sample.persons), sample.distances)


def _spread(seen: Seen, request: SearchRequest, sample: Sample | None) -> Sampled | None:
    """The shard's part of a sample of all: of many rows it is at hand, of few it is measured."""
    if sample is None:
        return None
    told = _sampled(seen, sample)
    if not sample.whole or not seen.searched:
        return told
    if seen.features.metric == "cosine":
        return told.taken(np.flatnonzero(np.isin(sample.positions, seen.spread)))
    modulation = Modulation(*(one.double() for one in request.modulation))
    w, c = project(request.x.double()[None], modulation)
    distances = lifted_distances(w[0], float(c[0]), seen.lifted)
    persons = seen.columns.persons[seen.spread]
    return _sampled(seen, Sample(seen.spread, persons, distances, whole=False))


@dataclass(frozen=True)
class _All:
    """The rows of all shards that pass some filters: a `Population`."""

    searched: int
    features: Features
    persons: npt.NDArray[np.bool_]
    unlabelled: int


class _Told(Features):
    """Features of a few rows that shards have told, where they lie: a chunk would be a copy."""

    def __init__(self, config: CMTConfig, rows: npt.NDArray[np.float16]) -> None:
        super().__init__(config.parts, config.dim, config.metric, "cpu")
        self._rows = torch.from_numpy(rows)

    def _by_device(
        self, positions: npt.NDArray[np.int64]
    ) -> Iterator[tuple[torch.device, npt.NDArray[np.int64]]]:
        if len(positions):
            yield self.device, np.arange(len(positions))

    def _gather(self, positions: npt.NDArray[np.int64], device: torch.device) -> Tensor:
        return self._rows[torch.from_numpy(positions)]


class _Names:
    """Places of row numbers and codes of people for the findings of one call.

    A row's place is where its features are in `features`, for those whose features were told.
    """

    def __init__(self, config: CMTConfig, answers: Sequence[Finding]) -> None:
        told = [one.numbers[: len(one.features)] for one in answers]
        kept, first = np.unique(_joined(told), return_index=True)
        samples = [s.numbers for one in answers for s in (one.whole, one.spread) if s is not None]
        every = np.unique(_joined([*(one.numbers for one in answers), *samples]))
        rest = np.setdiff1d(every, kept, assume_unique=True)
        numbers = np.concatenate([kept, rest])
        self._order = np.argsort(numbers)
        self._numbers = numbers[self._order]
        self._people = np.unique(_joined([one.shown for one in answers]))
        width = config.parts * config.dim
        rows = [one.features for one in answers] or [np.empty((0, width), np.float16)]
        self.features = _Told(config, np.concatenate(rows)[first])

    def places(self, numbers: Integers) -> Integers:
        """Of rows, by number."""
        return self._order[np.searchsorted(self._numbers, numbers)]

    def codes(self, keys: Integers) -> Integers:
        """Of people, by key; −1 where there is none."""
        return np.where(keys < 0, -1, np.searchsorted(self._people, keys))

    def shown(self, keys: Sequence[Integers]) -> npt.NDArray[np.bool_]:
        """Whether a person is among some, by code."""
        flags = np.zeros(len(self._people), np.bool_)
        flags[self.codes(_joined(keys))] = True
        return flags


def merged(
    config: CMTConfig, requests: Sequence[SearchRequest], found: Sequence[Sequence[Finding]]
) -> list[Scored]:
    """What one shard with the items of all would have found: found[i] are the shards' of one."""
    names = _Names(config, [one for of_one in found for one in of_one])
    return [_merged(*parts, names) for parts in zip(requests, found, strict=True)]


def _merged(request: SearchRequest, found: Sequence[Finding], names: _Names) -> Scored:
    numbers = _joined([one.numbers for one in found])
    distances = np.concatenate([one.distances for one in found])
    scores = np.concatenate([one.scores for one in found])
    exhaustive = found[0].exhaustive
    if exhaustive:
        listed = np.arange(len(numbers))
        candidates = sum(one.candidates for one in found)
    else:
        listed = np.lexsort((numbers, -scores))[: request.shortlist]
        candidates = min(request.shortlist, sum(one.candidates for one in found))
    order = np.lexsort((numbers[listed], distances[listed]))[: request.count]
    chosen = listed[order]
    parts = [one.parts for one in found if one.parts is not None]
    searched = sum(one.searched for one in found)
    return Scored(
        numbers=numbers[chosen],
        positions=names.places(numbers[chosen]),
        persons=names.codes(_joined([one.persons for one in found])[chosen]),
        distances=distances[chosen],
        scores=scores[chosen],
        recall_ranks=None if exhaustive else order + 1,
        unmodulated=_unmodulated(found, None if exhaustive else listed, chosen),
        parts=np.concatenate(parts)[chosen] if len(parts) == len(found) else None,
        candidates=candidates,
        exhaustive=exhaustive,
        sample=_sample(found, names) if request.sample and searched else None,
        recall_ms=max(one.recall_ms for one in found),
        rescore_ms=max(one.rescore_ms for one in found),
        seen=_All(
            searched,
            names.features,
            names.shown([one.shown for one in found]),
            sum(one.unlabelled for one in found),
        ),
    )


def _unmodulated(
    found: Sequence[Finding], listed: Integers | None, chosen: Integers
) -> Unmodulated | None:
    """Of the rows chosen and of all scored: those listed, or where all are, what the shards say."""
    told = [one.unmodulated for one in found if one.unmodulated is not None]
    if len(told) < len(found):
        return None
    mine = np.concatenate([one.mine for one in told])
    every = np.concatenate([one.everyone for one in told]) if listed is None else mine[listed]
    return Unmodulated(mine[chosen], np.sort(every))


def _sample(found: Sequence[Finding], names: _Names) -> Sample | None:
    """All rows where they are few, else those that one shard with all of them would take."""
    whole = [one.whole for one in found if one.whole is not None]
    if len(whole) == len(found) and sum(len(one.numbers) for one in whole) <= WHOLE:
        rows = _together(whole)
        rows = rows.taken(np.lexsort((rows.numbers, rows.distances)))
        return _placed(rows, names, whole=True)
    rows = _together([one.spread for one in found if one.spread is not None])
    first = np.argsort(scattered(rows.numbers))[:SAMPLE]
    rows = rows.taken(first)
    return _placed(rows.taken(np.argsort(rows.numbers)), names, whole=False)


def _together(samples: Sequence[Sampled]) -> Sampled:
    return Sampled(*(np.concatenate(columns) for columns in zip(*samples, strict=True)))


def _placed(rows: Sampled, names: _Names, *, whole: bool) -> Sample:
    places = names.places(rows.numbers)
    return Sample(places, names.codes(rows.persons), rows.distances, whole)


def _joined(parts: Sequence[Integers]) -> Integers:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
