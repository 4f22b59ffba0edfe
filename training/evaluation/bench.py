"""`cmt bench evaluate`: the SYSU-MM01 protocol from features, vectorised against a Python loop.

Features are random in the sizes of the real set (3,803 queries, ten single-shot galleries of 301
images): what is measured does not depend on their content.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer

from model import Modulation, modulated_distance
from model.benchmark import Comparison, compare, publish
from model.benchmark_table import Headline, as_fast, duration
from model.outputs import ResultsFile
from training.evaluation.metrics import FloatArray, IntArray, RankMetrics, rank_metrics
from training.evaluation.scoring import distances
from training.evaluation.splits import TRIALS

QUICK = ("--queries", "800", "--rounds", "2")
TOLERANCE = 1e-6
Side = Callable[[], list[RankMetrics]]
IMAGES_PER_CAMERA = 20  # of one identity, from which a trial draws one


@dataclass(frozen=True)
class ProtocolData:
    """Features and labels of a protocol's run: queries Q, pool of gallery images N, ten trials.

    queries, pool: Q×P×D and N×P×D.
    modulation: γ, β of the queries, Q×D.
    query_ids, query_cameras, pool_ids, pool_cameras: labels.
    galleries: each trial's images, indices into the pool.
    """

    queries: torch.Tensor
    pool: torch.Tensor
    modulation: Modulation
    query_ids: IntArray
    query_cameras: IntArray
    pool_ids: IntArray
    pool_cameras: IntArray
    galleries: list[IntArray]


def evaluate(
    queries: Annotated[int, typer.Option(min=1, help="Query images.")] = 3803,
    identities: Annotated[int, typer.Option(min=2, help="Test identities.")] = 96,
    parts: Annotated[int, typer.Option(min=1)] = 6,
    dim: Annotated[int, typer.Option(min=1, help="Channels of a part.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="How often both sides run, in turn.")] = 3,
    json_file: ResultsFile = None,
) -> None:
    """The full SYSU-MM01 protocol from features: ours against the usual loop over queries.

    Both rank ten galleries by the modulated distance and compute CMC, mAP and mINP, in float64.
    Stops with an error unless all figures are equal to 1e-6.

    Example: cmt bench evaluate --json benchmarks/results/evaluate.json
    """
    data = random_data(queries, identities, parts, dim)
    given = [gallery_distances(data, gallery) for gallery in data.galleries]
    cases: dict[str, tuple[Side, Side]] = {
        "from features": (
            lambda: vectorised(data, vectorised_distances(data)),
            lambda: loop(data, None),
        ),
        "from distances": (lambda: vectorised(data, given), lambda: loop(data, given)),
    }
    rows, results = [], []
    for name, (ours, theirs) in cases.items():
        comparison = compared(ours, theirs, rounds)
        rows.append((name, comparison.ours, comparison.theirs, comparison.ratio))
        results.append({"case": name, "seconds": comparison, "gallery": data.galleries[0].size})
    settings = {
        **{"queries": queries, "identities": identities, "parts": parts, "dim": dim},
        "rounds": rounds,
    }
    columns = ("", "ours, s: median (least–most)", "loop, s", "times faster")
    publish("evaluate", settings, columns, rows, results, json_file)


def compared(ours: Side, theirs: Side, rounds: int) -> Comparison:
    """Time both sides in turn; ValueError unless their last figures are equal to 1e-6."""
    figures: dict[str, list[RankMetrics]] = {}
    comparison = compare(
        lambda: figures.update(ours=ours()), lambda: figures.update(theirs=theirs()), rounds
    )
    require_equal(figures["ours"], figures["theirs"])
    return comparison


def random_data(queries: int, identities: int, parts: int, dim: int) -> ProtocolData:
    """Random features with SYSU-MM01's proportions: not everyone was seen by every camera."""
    generator = np.random.default_rng(0)
    torch_generator = torch.Generator().manual_seed(0)
    indoors = max(1, round(identities * 56 / 96))
    seen = {1: indoors, 2: indoors, 4: identities, 5: max(1, round(identities * 93 / 96))}
    cells = [(person, camera) for camera, count in seen.items() for person in range(count)]
    labels = np.repeat(np.array(cells, dtype=np.int64), IMAGES_PER_CAMERA, axis=0)
    starts = np.arange(len(cells)) * IMAGES_PER_CAMERA
    drawn = [
        starts + generator.integers(IMAGES_PER_CAMERA, size=starts.size) for _ in range(TRIALS)
    ]
    used, places = np.unique(np.concatenate(drawn), return_inverse=True)
    query_ids = np.arange(queries, dtype=np.int64) % identities
    # Camera 3 stands indoors, camera 6 does not.
    query_cameras = np.where(query_ids < indoors, generator.choice([3, 6], queries), 6)

    def features(labels: IntArray) -> torch.Tensor:
        people = torch.randn(identities, parts, dim, generator=torch.Generator().manual_seed(1))
        noise = torch.randn(labels.size, parts, dim, generator=torch_generator)
        return people[torch.from_numpy(labels)] + 3 * noise

    gamma, beta = torch.randn(2, queries, dim, generator=torch_generator)
    return ProtocolData(
        queries=features(query_ids),
        pool=features(labels[used, 0]),
        modulation=Modulation(1 + 0.1 * gamma, 0.1 * beta),
        query_ids=query_ids,
        query_cameras=query_cameras,
        pool_ids=labels[used, 0],
        pool_cameras=labels[used, 1],
        galleries=np.split(places.ravel(), TRIALS),
    )


def gallery_distances(data: ProtocolData, gallery: IntArray) -> FloatArray:
    """Modulated distances to one gallery, Q×N."""
    images = data.pool[torch.from_numpy(gallery)]
    return distances(modulated_distance, data.queries, images, data.modulation)


def vectorised_distances(data: ProtocolData) -> list[FloatArray]:
    """As `cmt evaluate` does: to every image of the pool once, then each trial's columns."""
    pool = distances(modulated_distance, data.queries, data.pool, data.modulation)
    return [np.take(pool, gallery, axis=1) for gallery in data.galleries]


def vectorised(data: ProtocolData, of_trials: list[FloatArray]) -> list[RankMetrics]:
    """Ours: each trial as a whole."""
    return [
        rank_metrics(
            *(distance, data.query_ids, data.pool_ids[gallery]),
            *(data.query_cameras, data.pool_cameras[gallery]),
        )
        for distance, gallery in zip(of_trials, data.galleries, strict=True)
    ]


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`."""
    for result in report["results"]:
        time = result["seconds"]
        yield Headline(
            f"SYSU-MM01 protocol {result['case']}, {report['settings']['queries']:,} queries",
            duration(time["ours"]),
            "loop over queries",
            duration(time["theirs"]),
            as_fast(time["ratio"]),
        )


def loop(data: ProtocolData, of_trials: list[FloatArray] | None) -> list[RankMetrics]:
    """The usual way: query by query, the gallery modulated by each (13), then sort and count.

    of_trials: distances, where those are given; None computes them from the features.
    """
    queries, pool, gamma, beta = (
        tensor.double().numpy() for tensor in (data.queries, data.pool, *data.modulation)
    )
    results = []
    for trial, gallery in enumerate(data.galleries):
        images, people, cameras = (
            pool[gallery],
            data.pool_ids[gallery],
            data.pool_cameras[gallery],
        )
        hits, precisions, penalties = [], [], []
        for q in range(len(queries)):
            if of_trials is None:
                difference = queries[q] - (images * gamma[q] + beta[q])
                distance = np.sqrt((difference**2).sum(axis=(1, 2)))
            else:
                distance = of_trials[trial][q]
            order = np.argsort(distance, kind="stable")
            if data.query_cameras[q] == 3:
                order = order[cameras[order] != 2]
            ranked = people[order]
            matches = ranked == data.query_ids[q]
            if not matches.any():
                continue
            _, first_places = np.unique(ranked, return_index=True)
            unique = ranked[np.sort(first_places)]
            hits.append((unique == data.query_ids[q]).cumsum()[:20])
            ranks = np.flatnonzero(matches) + 1
            precisions.append(np.mean([(i + 1) / rank for i, rank in enumerate(ranks)]))
            penalties.append(len(ranks) / ranks[-1])
        results.append(
            RankMetrics(
                np.mean(hits, axis=0), float(np.mean(precisions)), float(np.mean(penalties))
            )
        )
    return results


def require_equal(ours: list[RankMetrics], theirs: list[RankMetrics]) -> None:
    """ValueError unless every figure of every trial is equal to 1e-6."""
    for trial, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        length = min(a.cmc.size, b.cmc.size)  # fewer than 20 identities: the loop's is shorter
        pairs = np.array(
            [[*a.cmc[:length], a.mean_ap, a.mean_inp], [*b.cmc[:length], b.mean_ap, b.mean_inp]]
        )
        difference = float(np.abs(pairs[0] - pairs[1]).max())
        if difference > TOLERANCE:
            raise ValueError(
                f"trial {trial}: figures of the two sides differ by {difference:.2g}, more than "
                f"{TOLERANCE:g}; this is a bug, please report it"
            )
