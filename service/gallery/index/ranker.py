"""Rank what was scored: one order over both modalities, re-ranked, with probabilities.

Each gallery modality is searched by itself, so that neither starves the other in the shortlist, and
both are joined by score (`model.ranking`). Probabilities and re-ranking go by as many rows of each
modality as the request says count, however many are shown, so that a longer answer changes no
number in it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import Modality, Modulation
from model.config import MODALITIES
from model.ranking import (
    DEPTH,
    Beyond,
    Moments,
    RankingFacts,
    Reranking,
    Searched,
    blended,
    moments_of,
    neighbours_shared,
    own_share,
    posterior,
    scores,
    spread_ratio,
)
from service.gallery.index.features import Features
from service.gallery.index.searcher import Scored, SearchRequest

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """What a query's scores and probabilities go by, from its checkpoint.

    query: modality of the query, "mixed" where it has images of both. references: moments of its
    distances to the reference embeddings, by their modality; none without a calibration. facts:
    None without them. modulated: whether it ranks by γ and β. images: how many it was made from.
    prior: that the person is among what is searched. rerank: whether to.
    """

    query: str = "mixed"
    references: Mapping[Modality, Moments] = field(default_factory=dict)
    facts: RankingFacts | None = None
    modulated: bool = True
    images: int = 1
    prior: float = 0.5
    rerank: bool = False


class Presence(NamedTuple):
    """How many shards of a gallery answered, and how many there are."""

    answered: int
    total: int


@dataclass(frozen=True)
class Ranked:
    """All that was scored for a query, best first: N rows.

    groups: equal where person_id is equal. probabilities: None where the checkpoint has no fit for
    such a search. scored_ranks: places by score before re-ranking. recall_ranks: in the shortlist
    of the row's modality. certain: how many rows come before anything that was not scored.
    enrolled: that the person is among what was searched. people: distinct ones among it, an
    unlabelled item counting as one. features, positions: where the features of the rows are.
    shards: which answered, None in one process.
    """

    numbers: Integers
    groups: Integers
    distances: Floats
    scores: Floats
    probabilities: Floats | None
    scored_ranks: Integers
    recall_ranks: Integers | None
    unmodulated_ranks: Integers | None
    parts: npt.NDArray[np.float32] | None
    certain: int
    searched: int
    people: int
    enrolled: float | None
    candidates: int
    exhaustive: bool
    timings_ms: dict[str, float]
    features: Features
    positions: Integers
    shards: Presence | None = None

    def unmodulated_parts(self, x: Tensor, places: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """Squared part distances of the query (P×D) to the rows at K places, without γ and β: K×P.

        None with cosine as metric.
        """
        identity = Modulation.identity(1, x.shape[1])
        return self.features.rescore(x, identity, self.positions[places])[1]


class Searches(Protocol):
    """What finds the rows: `Searcher`, or one that asks several."""

    def search(self, queries: Sequence[SearchRequest]) -> list[Scored]:
        """As `Searcher.search`."""
        ...


@torch.inference_mode()
def rank(searcher: Searches, requests: Sequence[tuple[SearchRequest, Scale]]) -> list[Ranked]:
    """Search each of the gallery's modalities that a query asks for, and join what was found."""
    parts: list[SearchRequest] = []
    owners: list[tuple[int, Modality]] = []
    for place, (request, scale) in enumerate(requests):
        wanted = request.filters.gallery_modality
        for modality in MODALITIES:
            if not wanted or modality in wanted:
                only = replace(request.filters, gallery_modality=(modality,))
                parts.append(replace(request, filters=only, sample=scale.facts is not None))
                owners.append((place, modality))
    found: list[dict[Modality, Scored]] = [{} for _ in requests]
    for (place, modality), scored in zip(owners, searcher.search(parts), strict=True):
        found[place][modality] = scored
    return [
        _joined(of_modality, scale, request.counted or request.shortlist)
        for of_modality, (request, scale) in zip(found, requests, strict=True)
    ]


def _joined(found: Mapping[Modality, Scored], scale: Scale, counted: int) -> Ranked:
    started = time.perf_counter()
    present = {m: one for m, one in found.items() if one.searched}
    moments = {m: _moments(one, m, scale) for m, one in present.items()}
    every = list(present.values()) or list(found.values())[:1]
    kept = _Rows.joined([_Rows.of(m, one, moments[m], counted) for m, one in present.items()])
    by_score = kept.order()
    kept = kept.taken(by_score)
    searched = _searched(present, moments, scale, counted)
    reranked_ms = 0.0
    scored_ranks = np.arange(1, len(kept.scores) + 1)
    if scale.rerank and len(kept.scores):
        begun = time.perf_counter()
        raised = kept.scores + _bonus(kept, every[0].seen.features, searched, scale)
        searched = replace(searched, raised=float(raised.max() - kept.scores.max()))
        kept = replace(kept, scores=raised)
        again = kept.order()
        kept, scored_ranks = kept.taken(again), scored_ranks[again]
        reranked_ms = 1e3 * (time.perf_counter() - begun)
    probabilities, enrolled = _posterior(kept, present, moments, searched, scale, counted)
    joined_ms = 1e3 * (time.perf_counter() - started) - reranked_ms
    return Ranked(
        numbers=kept.numbers,
        groups=np.where(kept.persons < 0, -1 - kept.numbers, kept.persons),
        distances=kept.distances,
        scores=kept.scores,
        probabilities=probabilities,
        scored_ranks=scored_ranks,
        recall_ranks=None if every[0].exhaustive else kept.recall_ranks,
        unmodulated_ranks=_unmodulated_ranks(kept, every),
        parts=None if any(one.parts is None for one in every) else kept.parts,
        certain=int(np.count_nonzero(kept.scores >= _unseen(present, moments))),
        searched=searched.items,
        people=searched.people,
        enrolled=enrolled,
        candidates=sum(one.candidates for one in present.values()),
        exhaustive=every[0].exhaustive,
        timings_ms={
            "recall": max(one.recall_ms for one in found.values()),
            "rescore": sum(one.rescore_ms for one in found.values()) + joined_ms,
            "rerank": reranked_ms,
        },
        features=every[0].seen.features,
        positions=kept.places,
    )


@dataclass(frozen=True)
class _Rows:
    """Rows of one or more modalities, N each; see `Ranked` and `Scored`.

    counted: whether probabilities and re-ranking go by them.
    """

    numbers: Integers
    places: Integers  # in the segment
    infrared: npt.NDArray[np.bool_]
    persons: Integers
    distances: Floats
    scores: Floats
    counted: npt.NDArray[np.bool_]
    recall_ranks: Integers
    unmodulated: Floats
    parts: npt.NDArray[np.float32]

    @classmethod
    def of(cls, modality: Modality, scored: Scored, moments: Moments, counted: int) -> _Rows:
        count = len(scored.numbers)
        plain = scored.unmodulated
        return cls(
            scored.numbers,
            scored.positions,
            np.full(count, modality == "ir"),
            scored.persons,
            scored.distances,
            scores(scored.distances, moments),
            np.arange(count) < counted,
            np.zeros(count, np.int64) if scored.recall_ranks is None else scored.recall_ranks,
            np.zeros(count) if plain is None else plain.mine.astype(np.float64),
            np.zeros((count, 0), np.float32) if scored.parts is None else scored.parts,
        )

    @classmethod
    def joined(cls, rows: Sequence[_Rows]) -> _Rows:
        if not rows:
            whole, number = np.empty(0, np.int64), np.empty(0)
            none = np.empty(0, np.bool_)
            parts = np.empty((0, 0), np.float32)
            return cls(whole, whole, none, whole, number, number, none, whole, number, parts)
        columns = zip(*(vars(one).values() for one in rows), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def order(self) -> Integers:
        """Best score first; equal ones by distance, then in order of enrollment."""
        return np.lexsort((self.numbers, self.distances, -self.scores))

    @property
    def modalities(self) -> npt.NDArray[np.str_]:
        """Of each row."""
        return np.where(self.infrared, "ir", "rgb")

    def taken(self, order: Integers) -> _Rows:
        return _Rows(*(column[order] for column in vars(self).values()))


def _moments(scored: Scored, modality: Modality, scale: Scale) -> Moments:
    """Of the distances to what is searched of a modality, with the checkpoint's prior.

    A checkpoint without a calibration ranks by distance, whatever the modality: what a gallery of
    three items says of its distances is worse than nothing.
    """
    prior = scale.references.get(modality)
    if prior is None or scale.facts is None or scored.sample is None:
        return Moments(0.0, 1.0)
    here = moments_of(scored.sample.distances)
    return blended(here, scored.searched, prior, scale.facts.prior_items)


def _searched(
    present: Mapping[Modality, Scored],
    moments: Mapping[Modality, Moments],
    scale: Scale,
    counted: int,
) -> Searched:
    shown = np.zeros(max((len(one.seen.persons) for one in present.values()), default=0), np.bool_)
    for one in present.values():
        shown[: len(one.seen.persons)] |= one.seen.persons
    unlabelled = sum(one.seen.unlabelled for one in present.values())
    return Searched(
        people=int(np.count_nonzero(shown)) + unlabelled,
        items=sum(one.searched for one in present.values()),
        unlabelled=unlabelled,
        own=own_share(scale.query, {m: one.searched for m, one in present.items()}),
        ratio=spread_ratio(
            (one.searched, moments[m], scale.references[m])
            for m, one in present.items()
            if m in scale.references
        ),
        images=scale.images,
        beyond=[
            Beyond(one.searched, len(kept), float(scores(kept[-1:], moments[m])[0]))
            for m, one in present.items()
            if len(kept := one.distances[:counted]) < one.searched and not _whole(one)
        ],
    )


def _whole(scored: Scored) -> bool:
    """Whether the distances to all that is searched of a modality are known."""
    return scored.sample is not None and scored.sample.whole


def _unseen(present: Mapping[Modality, Scored], moments: Mapping[Modality, Moments]) -> float:
    """No row that was not scored has a better score than this one."""
    last = [
        float(scores(one.distances[-1:], moments[m])[0])
        for m, one in present.items()
        if len(one.distances) < one.searched
    ]
    return max(last, default=-np.inf)


def _bonus(rows: _Rows, features: Features, searched: Searched, scale: Scale) -> Floats:
    """What re-ranking adds to the scores of the best; rows come best first."""
    bonus = np.zeros(len(rows.scores))
    reranking = (scale.facts and scale.facts.reranking) or Reranking()
    images = reranking.images(
        searched.items - searched.unlabelled,
        searched.people - searched.unlabelled,
        searched.unlabelled,
    )
    weight = reranking.share(images)
    if weight:
        first = np.flatnonzero(rows.counted)[:DEPTH]
        best = rows.taken(first)
        known, by_score = scale.facts and scale.facts.between, best.scores
        if scale.facts is None:  # scores are distances, and nothing is known of them but these
            own = moments_of(best.distances)
            by_score, weight = scores(best.distances, own), weight * own.deviation
        bonus[first] = weight * neighbours_shared(
            by_score,
            best.modalities,
            features.between(best.places),
            known or {},
            reranking.size(images),
            reranking,
        )
    return bonus


def _posterior(
    rows: _Rows,
    present: Mapping[Modality, Scored],
    moments: Mapping[Modality, Moments],
    searched: Searched,
    scale: Scale,
    counted: int,
) -> tuple[Floats | None, float | None]:
    """Probabilities of the rows, and that of being enrolled; None where there is no fit."""
    if not searched.items:
        return np.empty(0), 0.0
    fits = scale.facts and scale.facts.posteriors_of(
        modulated=scale.modulated, reranked=scale.rerank
    )
    if not fits:
        return None, None
    others = [_others(one, moments[m], counted) for m, one in present.items() if _whole(one)]
    rest = sum(len(found) for found, _ in others)
    answer = posterior(
        np.concatenate([rows.scores, *(found for found, _ in others)]),
        np.concatenate([rows.persons, *(persons for _, persons in others)]),
        searched,
        labelled=fits[0],
        unlabelled=fits[1],
        prior=scale.prior,
        counted=np.concatenate([rows.counted, np.ones(rest, np.bool_)]),
    )
    return answer.probabilities[: len(rows.scores)], answer.enrolled


def _others(scored: Scored, moments: Moments, counted: int) -> tuple[Floats, Integers]:
    """Scores and persons of all but the rows that count, of a modality known as a whole."""
    assert scored.sample is not None
    rest = ~np.isin(scored.sample.positions, scored.positions[:counted])
    return scores(scored.sample.distances[rest], moments), scored.sample.persons[rest]


def _unmodulated_ranks(rows: _Rows, every: Sequence[Scored]) -> Integers | None:
    """1 + how many of all that was scored are nearer than each row without γ and β."""
    if any(one.unmodulated is None for one in every):
        return None
    ranks = np.ones(len(rows.scores), np.int64)
    for one in every:
        if one.unmodulated is not None:
            ranks += np.searchsorted(one.unmodulated.everyone, rows.unmodulated, side="left")
    return ranks
