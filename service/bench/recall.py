"""Two stages against everything: recall@10 and latency by shortlist length and kind of index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
import typer

from model import Modulation, project
from model.benchmark import Spread, publish, seconds
from service.bench.data import Data, features
from service.gallery.index import RecallIndex
from service.gallery.rescoring import Features

_TOP = 10
_BLOCK = 16_384
_TRAINING_PER_LIST = 40  # FAISS's own advice is 39 at least
_GRAPH_LIMIT = 100_000  # building HNSW over more takes hours on two cores
# What is tried with each kind of index, by the first letters of its name.
_SETTINGS: dict[str, list[tuple[str, int]]] = {
    "SQf": [("", 0)],
    "SQ8": [("", 0)],
    "IVF": [("nprobe", 16), ("nprobe", 64), ("nprobe", 256)],
    "HNS": [("efSearch", 256)],
}

Positions = npt.NDArray[np.int64]
# A projected query and the shortlist's length → positions.
Recall = Callable[[npt.NDArray[np.float32], int], Positions]


@dataclass(frozen=True)
class Gallery:
    """What the service keeps in memory, and the lifted vectors to build further indexes from."""

    data: Data
    features: Features
    lifted: npt.NDArray[np.float32]

    def modulation(self, q: int) -> Modulation:
        return Modulation(*(p[q : q + 1] for p in self.data.modulation))

    def exhaustive(self, q: int) -> Positions:
        """The ten nearest, best first, as the service's exhaustive search finds them."""
        x, modulation = self.data.queries[q], self.modulation(q)
        scores = self.features.score_all(x, modulation)
        found = np.argpartition(scores, 8 * _TOP)[: 8 * _TOP]
        return self._best(q, found)

    def two_stage(self, q: int, recall: Recall, shortlist: int) -> Positions:
        w, _ = project(self.data.queries[q : q + 1], self.modulation(q))
        return self._best(q, recall(w[0].numpy(), shortlist))

    def unmodulated(self, q: int, shortlist: int) -> Positions:
        """A shortlist by the distance without γ and β, then the modulated one."""
        identity = Modulation.identity(1, self.features.dim)
        scores = self.features.score_all(self.data.queries[q], identity)
        return self._best(q, np.argpartition(scores, shortlist)[:shortlist])

    def _best(self, q: int, found: Positions) -> Positions:
        distances, _ = self.features.rescore(self.data.queries[q], self.modulation(q), found)
        return found[np.argsort(distances)[:_TOP]]


def recall(
    sizes: Annotated[str, typer.Option(help="Gallery sizes N, comma-separated.")] = (
        "100000,1000000"
    ),
    shortlists: Annotated[str, typer.Option(help="Shortlist lengths.")] = "20,50,200,1000",
    queries: Annotated[int, typer.Option(help="Single queries per round.")] = 50,
    parts: Annotated[int, typer.Option(help="Parts P.")] = 6,
    dim: Annotated[int, typer.Option(help="Channels D per part.")] = 128,
    rounds: Annotated[int, typer.Option(help="How often all sides run, in turn.")] = 3,
    gamma: Annotated[float, typer.Option(help="Deviation of γ over queries and channels.")] = 0.5,
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
) -> None:
    """Measure recall@10 and latency of the two stages against the exhaustive modulated ranking.

    Example: cmt bench recall --sizes 20000 --queries 10
    """
    settings = {
        "sizes": sizes,
        "shortlists": shortlists,
        "queries": queries,
        "parts": parts,
        "dim": dim,
        "rounds": rounds,
        "gamma": gamma,
    }
    lengths = [int(length) for length in shortlists.split(",")]
    rows: list[tuple[object, ...]] = []
    results: list[dict[str, object]] = []
    for count in map(int, sizes.split(",")):
        gallery = _gallery(features(count, queries, parts, dim, gamma_deviation=gamma))
        truth = [gallery.exhaustive(q) for q in range(queries)]
        for length in lengths:
            found = [gallery.unmodulated(q, length) for q in range(queries)]
            share = _share(found, truth)
            results.append({"N": count, "index": "unmodulated", "C": length, "recall@10": share})
            rows.append((f"{count:,}", "shortlist by unmodulated distance", length, share, "", ""))
        for name, search in _indexes(gallery.lifted):
            for length in lengths:
                found = [gallery.two_stage(q, search, length) for q in range(queries)]
                share = _share(found, truth)
                time, part = _time(gallery, search, length, queries, rounds)
                results.append(
                    {
                        "N": count,
                        "index": name,
                        "C": length,
                        "recall@10": share,
                        "seconds per query": time,
                        "share of exhaustive time": part,
                    }
                )
                rows.append((f"{count:,}", name, length, share, time, part))
    columns = ("N", "index", "shortlist", "recall@10", "s per query", "share of exhaustive time")
    publish("recall", settings, columns, rows, results, json)


def _gallery(data: Data) -> Gallery:
    count, parts, dim = data.gallery.shape
    kept = Features(parts, dim, "euclidean", "cpu")
    lifted = np.empty((count, (parts + 1) * dim), np.float32)
    for start in range(0, count, _BLOCK):
        rows = data.gallery[start : start + _BLOCK].flatten(1).numpy()
        lifted[start : start + len(rows)] = kept.add(rows).numpy()
    return Gallery(data, kept, lifted)


def _indexes(lifted: npt.NDArray[np.float32]) -> Iterator[tuple[str, Recall]]:
    """The service's index first, then others of FAISS over the same lifted vectors, one by one."""
    count, size = lifted.shape
    ours = RecallIndex(size)
    for start in range(0, count, _BLOCK):
        ours.add(lifted[start : start + _BLOCK])
    yield "flat (the service's)", partial(ours.search, allowed=np.ones(count, np.bool_))
    del ours

    lists = round(2 * count**0.5)
    factories = ["SQfp16", "SQ8", f"IVF{lists},SQ8"]
    if count <= _GRAPH_LIMIT:
        factories.append("HNSW32")
    for factory in factories:
        index = faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
        wanted = min(count, _TRAINING_PER_LIST * lists)
        chosen = np.random.default_rng(0).choice(count, wanted, replace=False)
        index.train(lifted[chosen])
        index.add(lifted)
        for parameter, value in _SETTINGS[factory[:3]]:
            if parameter:
                faiss.ParameterSpace().set_index_parameter(index, parameter, value)
            yield f"{factory} {parameter} {value or ''}".strip(), partial(_search, index)


def _search(index: Any, w: npt.NDArray[np.float32], length: int) -> Positions:
    found: Positions = index.search(w[None], length)[1][0]
    return found[found >= 0]


def _share(found: list[Positions], truth: list[Positions]) -> float:
    """recall@10: the share of the exhaustive ten nearest that were found, mean over queries."""
    return float(
        np.mean([len(set(f) & set(t)) / len(t) for f, t in zip(found, truth, strict=True)])
    )


def _time(
    gallery: Gallery, search: Recall, length: int, queries: int, rounds: int
) -> tuple[Spread, Spread]:
    """Seconds per single query, and over the exhaustive search's, both in turn."""
    ours, shares = [], []
    with torch.inference_mode():
        for _ in range(rounds):
            time = seconds(lambda: [gallery.two_stage(q, search, length) for q in range(queries)])
            few = max(1, queries // 10)  # it takes long, and every query takes the same
            full = seconds(lambda n=few: [gallery.exhaustive(q) for q in range(n)])  # type: ignore[misc]
            ours.append(time / queries)
            shares.append(time / queries / (full / few))
    return Spread.of(ours), Spread.of(shares)
