"""A query of several images of one person: the service's fusion against other ways to rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import typer
from torch import Tensor

from model import CMT, Modulation, load_checkpoint
from model.benchmark import publish
from model.outputs import ResultsFile
from service.bench.crops import (
    BenchmarkDataError,
    crop_files,
    features_of,
    modality_of,
    person_numbers,
)
from service.bench.data import CHECKPOINT, numbers
from service.bench.ranking import Ranking, ranked
from service.embedding.embedder import Embedder
from service.pipeline.search_batcher import fuse

_BESIDE = ((2, 3), (3, 2))  # two cameras of SYSU-MM01 at the same place
_DIRECTIONS = {"infrared → visible": True, "visible → infrared": False}

Positions = npt.NDArray[np.int64]


class _Crops(NamedTuple):
    """M crops. features: M×P×D. persons, cameras: M numbers. infrared: M flags."""

    features: Tensor
    persons: Positions
    cameras: Positions
    infrared: npt.NDArray[np.bool_]


def fusion(
    root: Annotated[list[Path], typer.Option(help="Folder in the layout of SYSU-MM01.")],
    checkpoint: Annotated[Path, typer.Option(help="What embeds the crops.")] = CHECKPOINT,
    shots: Annotated[str, typer.Option(help="Images K of a query, comma-separated.")] = "1,2,4,8",
    draws: Annotated[int, typer.Option(min=1, help="How often queries and gallery are drawn.")] = (
        100
    ),
    json: ResultsFile = None,
) -> None:
    """Rank with K images of a person at once, in four ways; K = 1 is the single shot.

    Mean, modulated is the service's way: the mean of the representations, and γ, β generated from
    it. Against it: the same without modulation; and K single queries, each with its own γ, β, whose
    smallest or mean distance to an item counts.

    Each draw takes one image per person and camera of the other modality as the gallery, as the
    single-shot protocol of SYSU-MM01 does, and one query per person, the first K of as many of its
    images as the largest K. People with fewer images are in the gallery only, so all K are measured
    on the same people and galleries. A query with an image of camera 2 or 3 leaves out the other
    one's gallery images. Only people count that the checkpoint was not trained on. The deviation is
    over the draws, of images of the same people: other people would differ more.

    Example: cmt bench fusion --root synth-sysu --json fusion.json
    """
    network, info = load_checkpoint(checkpoint)
    trained = set(info.training.get("identities", ()))
    files = [file for file in crop_files(root) if int(file.parent.name) not in trained]
    if not files:
        raise BenchmarkDataError(
            f"{checkpoint} was trained on everybody in {', '.join(map(str, root))}; give a folder "
            "with other people"
        )
    crops = _Crops(
        features_of(files, Embedder(checkpoint)),
        np.array(person_numbers(files)),
        np.array([int(file.parents[1].name.removeprefix("cam")) for file in files]),
        np.array([modality_of(file) == "ir" for file in files]),
    )
    results = [
        result
        for direction, from_infrared in _DIRECTIONS.items()
        for result in _measure(crops, network, from_infrared, numbers(shots), draws, direction)
    ]
    settings = {
        "root": " --root ".join(map(str, root)),
        "checkpoint": str(checkpoint),
        "shots": shots,
        "draws": draws,
    }
    columns = ("", "K", "way", "rank-1", "mAP", "mINP", "queries", "people", "items")
    rows = [
        tuple(
            f"{100 * v['mean']:.1f} ± {100 * v['deviation']:.1f}" if isinstance(v, dict) else v
            for v in result.values()
        )
        for result in results
    ]
    publish("fusion", settings, columns, rows, results, json)


@torch.inference_mode()
def _measure(
    crops: _Crops,
    network: CMT,
    from_infrared: bool,
    shots: Sequence[int],
    draws: int,
    direction: str,
) -> list[dict[str, Any]]:
    asks = crops.infrared == from_infrared
    answerable = []
    scores: dict[tuple[int, str], list[Ranking]] = {}
    for draw in range(draws):
        generator = np.random.default_rng(draw)
        gallery = _one_of_each(crops, np.flatnonzero(~asks), generator)
        queries = _some_of_each(crops, np.flatnonzero(asks), max(shots), generator)
        if not len(queries):
            raise BenchmarkDataError(
                f"nobody has {max(shots)} images of that modality; give less --shots"
            )
        matches = crops.persons[queries[:, :1]] == crops.persons[gallery]
        counts = np.ones_like(matches)
        for asked, left_out in _BESIDE:
            stands_there = (crops.cameras[queries] == asked).any(axis=1)
            counts &= ~(stands_there[:, None] & (crops.cameras[gallery] == left_out))
        answerable.append(int((matches & counts).any(axis=1).sum()))
        y = crops.features[gallery].half()  # as the service keeps them
        for k in shots:
            for way, distances in ways(network, crops.features[queries[:, :k]], y).items():
                score = ranked(distances.numpy(), matches, counts)
                scores.setdefault((k, way), []).append(score)
    return [
        {
            "direction": direction,
            "K": k,
            "way": way,
            **{name: _spread(values) for name, values in _columns(drawn).items()},
            "queries": float(np.mean(answerable)),
            "people in the gallery": len(set(crops.persons[gallery])),
            "gallery": len(gallery),
        }
        for (k, way), drawn in scores.items()
    ]


def ways(network: CMT, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Distances of queries x (Q×K×P×D) to items y (N×P×D) in every way, each Q×N."""
    fused = torch.stack([fuse(one, normalise=network.config.normalise_test) for one in x])
    plain = Modulation.identity(len(fused), fused.shape[2])
    single = x.flatten(0, 1)
    each = network.distance(single, y, network.modulation(single)).view(*x.shape[:2], -1)
    return {
        "mean, modulated": network.distance(fused, y, network.modulation(fused)),
        "mean, unmodulated": network.distance(fused, y, plain),
        "smallest distance of K": each.amin(1),
        "mean distance of K": each.mean(1),
    }


def _one_of_each(crops: _Crops, pool: Positions, generator: np.random.Generator) -> Positions:
    """One crop of the pool for each person and camera."""
    shuffled = generator.permutation(pool)
    both = np.stack([crops.persons[shuffled], crops.cameras[shuffled]])
    _, first = np.unique(both, axis=1, return_index=True)
    return shuffled[first]


def _some_of_each(
    crops: _Crops, pool: Positions, count: int, generator: np.random.Generator
) -> Positions:
    """`count` crops of the pool for each person who has at least that many: persons×count."""
    shuffled = generator.permutation(pool)
    own = [shuffled[crops.persons[shuffled] == person] for person in np.unique(crops.persons[pool])]
    chosen = [positions[:count] for positions in own if len(positions) >= count]
    return np.array(chosen, dtype=np.int64).reshape(-1, count)


def _columns(drawn: Sequence[Ranking]) -> dict[str, Sequence[float]]:
    return dict(zip(("rank-1", "mAP", "mINP"), zip(*drawn, strict=True), strict=True))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values))}
