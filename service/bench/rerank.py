"""What re-ranking costs a query, beside the rest of its search."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer

from model import CMT, Modulation, load_checkpoint
from model.benchmark import Spread, compare, publish, seconds
from model.benchmark_table import Headline, as_fast, duration, ratio_of
from model.outputs import ResultsFile
from model.ranking import Moments, RankingFacts, Reranking, neighbours_shared
from service.bench.data import (
    CHECKPOINT,
    STATISTICS,
    Checkpoint,
    Data,
    Source,
    Statistics,
    numbers,
)
from service.gallery.feed import Stored
from service.gallery.index.features import Features
from service.gallery.index.shard import Ranked, Scale, SearchRequest, Shard

QUICK = ("--rounds", "2")
_BLOCK = 16_384
_QUERIES = 32
_CALLS = 50
# Of a checkpoint that is not calibrated: any numbers take the same time.
_SOME = RankingFacts(prior_items=30, between={"rgb rgb": (1.0, 0.2)})


def rerank(
    sizes: Annotated[str, typer.Option(help="Gallery sizes N, comma-separated.")] = (
        "10000,100000"
    ),
    candidates: Annotated[int, typer.Option(min=1, help="Length of the shortlist.")] = 200,
    items: Annotated[
        str, typer.Option(help="How many items to re-rank alone, comma-separated.")
    ] = "100,200",
    rounds: Annotated[int, typer.Option(min=1, help="How often both sides run, in turn.")] = 3,
    statistics: Statistics = STATISTICS,
    checkpoint: Checkpoint = CHECKPOINT,
    json: ResultsFile = None,
) -> None:
    """Time single queries with re-ranking and without, and re-ranking alone.

    The gallery shows each person in four visible crops; queries are infrared. The search is the
    service's, from a query's x, γ, β to scores and probabilities, on a CPU.

    Example: cmt bench rerank --sizes 10000
    """
    settings = {
        "sizes": sizes,
        "candidates": candidates,
        "items": items,
        "rounds": rounds,
        "statistics": str(statistics),
        "checkpoint": str(checkpoint),
    }
    source = Source.load(statistics, checkpoint)
    _, info = load_checkpoint(checkpoint)
    known = info.calibration and info.calibration.facts.ranking
    facts = known or _SOME
    rows: list[tuple[object, ...]] = []
    results: list[dict[str, object]] = []
    for count in numbers(sizes):
        data = source.sample(count, _QUERIES)
        shard = _filled(data, source.network)
        plain, again = (_Queries(shard, data, facts, candidates, rerank=on) for on in (False, True))
        time = compare(plain.one, again.one, rounds)
        stage = Spread.of([again.one().timings_ms["rerank"] / 1e3 for _ in range(_CALLS)])
        shard.close()
        results.append(
            {"N": count, "without": time.ours, "with": time.theirs, "stage seconds": stage}
        )
        rows.append((f"{count:,}", time.ours, time.theirs, stage))
    data = source.sample(max(numbers(items)), 1)
    features = _features(data)
    for count in numbers(items):
        work = partial(_reranked, features, np.arange(count), facts)
        alone = Spread.of([seconds(work) for _ in range(_CALLS)])
        results.append({"items": count, "seconds": alone})
        rows.append((f"{count} items alone", "", "", alone))
    columns = ("N", "a query, s", "re-ranked, s", "of which re-ranking, s")
    publish("rerank", settings, columns, rows, results, json)


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`."""
    for result in report["results"]:
        if "N" in result:
            yield Headline(
                f"search of {result['N']:,} crops, re-ranked",
                duration(result["with"]),
                "without re-ranking",
                duration(result["without"]),
                as_fast(ratio_of(result["without"], result["with"])),
            )


class _Queries:
    """The queries of some data, one after the other and again."""

    def __init__(
        self, shard: Shard, data: Data, facts: RankingFacts, candidates: int, *, rerank: bool
    ) -> None:
        self._shard = shard
        scale = Scale(references={"rgb": Moments(1.0, 0.2)}, facts=facts, rerank=rerank, query="ir")
        parts = zip(data.queries, *(torch.split(p, 1) for p in data.modulation), strict=True)
        self._requests = cycle(
            [
                (SearchRequest(x, Modulation(gamma, beta), candidates, candidates), scale)
                for x, gamma, beta in parts
            ]
        )

    def one(self) -> Ranked:
        """Rank for the next one."""
        return self._shard.rank([next(self._requests)])[0]


def _filled(data: Data, network: CMT) -> Shard:
    shard = Shard(network.config, "cpu")
    for start in range(0, len(data.gallery), _BLOCK):
        rows = data.gallery[start : start + _BLOCK]
        count = len(rows)
        shard.add(
            Stored(
                numbers=list(range(start + 1, start + count + 1)),
                persons=[str(person) for person in data.persons[start : start + count].tolist()],
                cameras=[None] * count,
                modalities=["rgb"] * count,
                captured=[None] * count,
                features=rows.flatten(1).numpy(),
            )
        )
    shard.wait()
    return shard


def _features(data: Data) -> Features:
    _, parts, dim = data.gallery.shape
    features = Features(parts, dim, "euclidean", "cpu")
    features.add(data.gallery.flatten(1).numpy())
    return features


def _reranked(features: Features, positions: npt.NDArray[np.int64], facts: RankingFacts) -> None:
    """As the service re-ranks: distances among the items, then what their neighbours say."""
    reranking = facts.reranking or Reranking()
    neighbours_shared(
        np.linspace(3, -3, len(positions)),
        np.full(len(positions), "rgb"),
        features.between(positions),
        facts.between,
        reranking.size(4),
        reranking,
    )
