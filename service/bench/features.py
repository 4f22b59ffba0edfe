"""Measure the features that other benchmarks sample, and how similar samples are to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from model import Modulation, load_checkpoint, modulated_distance
from model.benchmark import publish
from model.outputs import ResultsFile, file_option
from service.bench.crops import embedded
from service.bench.data import CHECKPOINT, STATISTICS, Cache, Data, Source, unmodified
from service.bench.population import CROPS_PER_PERSON, Population
from service.embedding.embedder import Embedder

_NEAREST = 10


def features(
    root: Annotated[list[Path], typer.Option(help="Folder in the layout of SYSU-MM01.")],
    checkpoint: Annotated[Path, typer.Option(help="What embeds the crops.")] = CHECKPOINT,
    output: Annotated[
        Path, typer.Option(help="Means and covariances go here.", callback=file_option)
    ] = STATISTICS,
    cache: Cache = None,
    rank: Annotated[int, typer.Option(min=1, help="Leading directions per covariance.")] = 192,
    queries: Annotated[int, typer.Option(min=1, help="Queries of the comparison.")] = 500,
    json: ResultsFile = None,
) -> None:
    """Write means and covariances of a folder's features, and compare samples with the real ones.

    Both sides rank galleries of the same size and people, four visible crops each, for infrared
    queries of these people.

    Example: cmt bench features --root synth-sysu --output benchmarks/features.safetensors
    """
    crops = embedded(root, Embedder(checkpoint), cache)
    network, info = load_checkpoint(checkpoint)
    Population.measure(crops, info.fingerprint, rank).save(output)
    source = Source.load(output, checkpoint)
    real = unmodified(crops, len(crops.features), queries, network, each=CROPS_PER_PERSON)
    sampled = source.sample(len(real.gallery), queries)
    results = [
        {"features": name, "N": len(data.gallery), **likeness(data)}
        for name, data in (("real", real), ("sampled", sampled))
    ]
    settings = {
        "root": " --root ".join(map(str, root)),
        "checkpoint": str(checkpoint),
        "output": str(output),
        "rank": rank,
        "queries": queries,
    }
    columns = tuple(results[0])
    rows = [
        tuple(f"{v:.4g}" if isinstance(v, float) else v for v in result.values())
        for result in results
    ]
    rows.append((f"{len(source.population.people)} persons", source.population.crops, *[""] * 7))
    publish("features", settings, columns, rows, results, json)


def likeness(data: Data) -> dict[str, float]:
    """Statistics of a search over this data, as means over the queries."""
    plain = modulated_distance(
        data.queries, data.gallery, Modulation.identity(len(data.queries), data.gallery.shape[2])
    )
    modulated = modulated_distance(data.queries, data.gallery, data.modulation)
    gamma = data.modulation.gamma
    return {
        "rank-1": _rank_one(plain, data),
        "modulated rank-1": _rank_one(modulated, data),
        "top ten that both rankings share": _shared(plain, modulated),
        "nearest / median distance": _contrast(modulated, 1),
        "tenth / median distance": _contrast(modulated, _NEAREST),
        "mean γ": float(gamma.mean()),
        "deviation of γ": float(gamma.std(0).mean()),
    }


def _rank_one(distances: Tensor, data: Data) -> float:
    return float((data.persons[distances.argmin(1)] == data.wanted).double().mean())


def _shared(first: Tensor, second: Tensor) -> float:
    ten = [d.topk(_NEAREST, largest=False).indices for d in (first, second)]
    return float((ten[0][:, :, None] == ten[1][:, None]).any(2).double().mean())


def _contrast(distances: Tensor, rank: int) -> float:
    return float((distances.kthvalue(rank, 1).values / distances.median(1).values).mean())
