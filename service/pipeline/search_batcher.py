"""Queries of all requests wait here for the gallery, and are ranked together.

A batch is what has arrived while the previous one was ranked: rows, tables and the store are read
once for all of it. Exhaustive queries have a thread of their own, so that the others never wait for
them; they end early once no request waits for them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from model import Calibration, Modality, Modulation
from model.calibration import FloatArray, moments_over
from model.cmt import ranked_mean
from service.embedding.embedder import Embedder
from service.gallery import Gallery, Options, Query, Scale, SearchResult
from service.kit.concurrency import in_thread
from service.kit.device_loss import is_device_lost
from service.kit.precedence import Abandoned, while_wanted

_TOGETHER = 32  # queries at most, so that the first of them need not wait for too many others


Rerank = Literal["none", "k_reciprocal"]
Measured = Mapping[Modality, FloatArray]  # of a query's distances to references


@dataclass(frozen=True)
class Search(Options):
    """How to rank.

    modulation: False ranks by the unmodulated distance. rerank: None leaves it to the checkpoint.
    prior: probability, before looking, that the person is among what is searched.
    """

    modulation: bool = True
    rerank: Rerank | None = None
    prior: float = 0.5


class Ranking(NamedTuple):
    """A ranking with what the checkpoint's calibration says of each hit.

    similarities: the probability that a pair drawn at even odds shows one person; agreements: of
    each part, without γ and β, where asked to explain. None where the checkpoint is not calibrated
    for this query and gallery modality. rerank: how the ranking was. seconds: of each stage, of all
    queries that were ranked together.
    """

    result: SearchResult
    similarities: list[float | None]
    agreements: list[list[float] | None]
    rerank: Rerank
    seconds: dict[str, float]


@dataclass(frozen=True)
class EmbeddedQuery:
    """A query for one person: features K×P×D of K images by `embedder`.

    modality: of all images, or "mixed".
    """

    embedder: Embedder
    features: Tensor
    modality: str
    search: Search


@dataclass(eq=False)
class _WaitingQuery:
    query: EmbeddedQuery
    done: asyncio.Future[Ranking]


class _Line:
    """Requests that are ranked in one thread, batch after batch."""

    def __init__(self, gallery: Gallery, name: str) -> None:
        self._gallery = gallery
        self._thread = ThreadPoolExecutor(1, name)
        self._waiting: deque[_WaitingQuery] = deque()
        self._work: asyncio.Task[None] | None = None

    async def rank(self, query: EmbeddedQuery) -> Ranking:
        waiting = _WaitingQuery(query, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        return await waiting.done

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    async def _run(self) -> None:
        while self._waiting:
            count = min(_TOGETHER, len(self._waiting))
            taken = [self._waiting.popleft() for _ in range(count)]
            batch = [one for one in taken if not one.done.done()]  # the others were cancelled
            work = partial(_outcomes, self._gallery, batch)
            outcomes: Sequence[Ranking | Exception]
            try:
                outcomes = await in_thread(self._thread, work)
            except Exception as error:  # of the thread pool, not of a search
                outcomes = [error] * len(batch)
            for one, outcome in zip(batch, outcomes, strict=True):
                if one.done.done():
                    continue
                if isinstance(outcome, Exception):
                    one.done.set_exception(outcome)
                else:
                    one.done.set_result(outcome)


class SearchBatcher:
    """Ranks `gallery`. Used on one event loop."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._short, self._long = _Line(gallery, "search"), _Line(gallery, "exhaustive")

    async def rank(self, query: EmbeddedQuery) -> Ranking:
        """Rank the gallery for one person. Raises what `Gallery.search_all` does."""
        search = query.search
        return await (self._long if search.exhaustive else self._short).rank(query)

    def rank_at_once(self, query: EmbeddedQuery) -> Ranking:
        """The same in the calling thread, beside whatever is ranked."""
        return _ranked(self._gallery, query.embedder, [query])[0]

    def close(self) -> None:
        """End the threads, once nothing is in progress."""
        self._short.close()
        self._long.close()


def _outcomes(gallery: Gallery, waiting: Sequence[_WaitingQuery]) -> list[Ranking | Exception]:
    """Each query's ranking, or its own error."""
    batch = [one.query for one in waiting]
    outcomes: dict[int, Ranking | Exception] = {}
    embedders = {id(query.embedder): query.embedder for query in batch}
    with while_wanted(lambda: not all(one.done.done() for one in waiting)):
        for embedder in embedders.values():  # two while the checkpoint is being changed
            members = [i for i, query in enumerate(batch) if query.embedder is embedder]
            ranked = _ranked_apart(gallery, embedder, [batch[i] for i in members])
            outcomes.update(zip(members, ranked, strict=True))
    return [outcomes[i] for i in range(len(batch))]


def _ranked_apart(
    gallery: Gallery, embedder: Embedder, batch: Sequence[EmbeddedQuery]
) -> Iterable[Ranking | Exception]:
    try:
        return _ranked(gallery, embedder, batch)
    except Exception as error:
        if len(batch) == 1 or isinstance(error, Abandoned) or is_device_lost(error):
            return [error] * len(batch)
        return [one for query in batch for one in _ranked_apart(gallery, embedder, [query])]


@torch.inference_mode()
def _ranked(gallery: Gallery, embedder: Embedder, batch: Sequence[EmbeddedQuery]) -> list[Ranking]:
    """Rank the queries of one embedder together.

    Calibration curves are fitted on queries of one image; a query of several images uses the same
    ones, a query of both modalities none.
    """
    started = time.perf_counter()
    info = embedder.info
    x = torch.stack([fuse(s.features, normalise=info.config.normalise_test) for s in batch])
    gamma, beta = embedder.modulation(x)
    modulations = [
        Modulation(gamma[i : i + 1], beta[i : i + 1]) if query.search.modulation else None
        for i, query in enumerate(batch)
    ]
    measured = [_measured(info.calibration, *parts) for parts in zip(x, modulations, strict=True)]
    scales = [
        _scale(info.calibration, *parts) for parts in zip(batch, modulations, measured, strict=True)
    ]
    queries = [
        Query(*parts)
        for parts in zip(x, modulations, (s.search for s in batch), scales, strict=True)
    ]
    modulated = time.perf_counter() - started
    results = gallery.search_all(queries, model=info.fingerprint)
    rankings = [
        _ranking(info.calibration, *parts)
        for parts in zip(batch, queries, measured, results, strict=True)
    ]
    took = time.perf_counter() - started
    return [one._replace(seconds=_seconds(one.result, modulated, took)) for one in rankings]


def _seconds(result: SearchResult, modulated: float, took: float) -> dict[str, float]:
    """Of each stage of ranking: those that the search has measured, and `rank` for the rest."""
    known = {"modulate": modulated, **{stage: ms / 1e3 for stage, ms in result.timings_ms.items()}}
    return {**known, "rank": took - sum(known.values())}


def _measured(
    calibration: Calibration | None, x: Tensor, modulation: Modulation | None
) -> Measured:
    """Distances of one query (P×D) to the checkpoint's references, of which there may be none."""
    if calibration is None:
        return {}
    return calibration.measured(x[None], modulation or Modulation.identity(1, x.shape[1]))


def _scale(
    calibration: Calibration | None,
    query: EmbeddedQuery,
    modulation: Modulation | None,
    measured: Measured,
) -> Scale:
    """What the scores and probabilities of one query go by."""
    facts = None if calibration is None else calibration.facts.ranking
    rerank = query.search.rerank
    if rerank is None:
        by_default = facts is not None and facts.reranking is not None and facts.reranking.default
        rerank = "k_reciprocal" if by_default else "none"
    return Scale(
        query=query.modality,
        references=moments_over(measured)[0] if facts and measured else {},
        facts=facts,
        modulated=modulation is not None,
        images=len(query.features),
        prior=query.search.prior,
        rerank=rerank == "k_reciprocal",
    )


def _ranking(
    calibration: Calibration | None,
    embedded: EmbeddedQuery,
    query: Query,
    measured: Measured,
    result: SearchResult,
) -> Ranking:
    rerank: Rerank = "k_reciprocal" if query.scale.rerank else "none"
    hits = result.hits
    nothing: list[Any] = [None] * len(hits)
    if calibration is None:
        return Ranking(result, nothing, nothing, rerank, {})
    of_pair: Any = {
        "query": embedded.modality,
        "gallery": [hit.item.modality for hit in hits],
    }
    agreements = nothing
    if hits and hits[0].unmodulated_parts is not None:
        parts = [hit.unmodulated_parts or [] for hit in hits]
        agreements = calibration.agreements(query.x, parts, **of_pair)
    distances = [hit.distance for hit in hits]
    similarities = calibration.similarities(
        measured, distances, modulated=query.modulation is not None, **of_pair
    )
    return Ranking(result, similarities, agreements, rerank, {})


def fuse(features: Tensor, *, normalise: bool) -> Tensor:
    """Complete representations of K images, K×P×D → their mean, P×D.

    normalise: scale the mean to unit norm over all P·D numbers, as a checkpoint that normalises
    ranks. γ and β are then generated once, from the mean. `cmt bench fusion` compares this with one
    image alone and with other ways.
    """
    return torch.from_numpy(ranked_mean(features.numpy()[:, None], normalise=normalise))[0]
