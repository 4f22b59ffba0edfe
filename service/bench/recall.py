"""Two stages against exhaustive search: recall@10 and latency by shortlist length and index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from model import Modulation, project
from model.benchmark import Spread, publish, seconds
from model.benchmark_table import Headline, as_fast, duration, inverse
from model.device import DEVICES, chosen_device
from model.outputs import ResultsFile, picture_option
from model.terminal import say
from service.bench.crops import embedded
from service.bench.data import (
    CHECKPOINT,
    STATISTICS,
    Cache,
    Checkpoint,
    Data,
    Source,
    Statistics,
    numbers,
    stronger,
    unmodified,
)
from service.bench.engine import Engine, Index, Positions
from service.embedding.embedder import Embedder
from service.gallery.index.gpu_index import obstacles

QUICK = ("--sizes", "10000,100000", "--shortlists", "200", "--queries", "20", "--rounds", "2")
TOP = 10
_REAL = "the checkpoint's γ, β"
_GOOD = 0.99  # recall@10 of what the table of all benchmarks shows
_UNMODIFIED = 10_000
_TIMED_EXHAUSTIVE = 3  # queries a round: it takes long, and every query takes the same


def recall(
    sizes: Annotated[str, typer.Option(help="Gallery sizes N, comma-separated.")] = (
        "10000,100000,1000000"
    ),
    shortlists: Annotated[str, typer.Option(help="Shortlist lengths.")] = "20,50,200,1000",
    queries: Annotated[int, typer.Option(min=1, help="Queries whose recall is averaged.")] = 50,
    timed: Annotated[int, typer.Option(min=1, help="Queries on the clock in a round.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="How often all sides run, in turn.")] = 3,
    gamma: Annotated[
        float, typer.Option(help="Beside the real γ: one multiplied by 1 + GAMMA·N(0, 1).")
    ] = 0.5,
    statistics: Statistics = STATISTICS,
    checkpoint: Checkpoint = CHECKPOINT,
    root: Annotated[
        list[Path] | None,
        typer.Option(help="SYSU-layout folder; its features are searched unmodified as well."),
    ] = None,
    cache: Cache = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw recall over latency here.", callback=picture_option)
    ] = None,
    device: Annotated[str, typer.Option(help=f"{DEVICES}.")] = "cpu",
    json: ResultsFile = None,
) -> None:
    """Measure recall@10 and latency of the two stages against the exhaustive modulated ranking.

    Features are sampled with the means and covariances of rendered crops. γ and β are what the
    checkpoint's generators make of each query. A shortlist by the distance *without* γ and β, then
    rescored with them, is what the modulated index is compared with. On a GPU, all kinds of index
    that can be built there are measured beside the product of all rows; the service chooses by the
    file that is written (setting index_figures).

    Example: cmt bench recall --sizes 20000 --queries 10 --plot recall.png
    """
    device = chosen_device(device)
    settings = {
        "device": device,
        "sizes": sizes,
        "shortlists": shortlists,
        "queries": queries,
        "timed": timed,
        "rounds": rounds,
        "gamma": gamma,
        "statistics": str(statistics),
        "checkpoint": str(checkpoint),
        **({"root": " --root ".join(map(str, root))} if root else {}),
    }
    if device != "cpu":
        for why in filter(None, obstacles(device).values()):
            say(f"not measured: {why}")
    source = Source.load(statistics, checkpoint)
    lengths = numbers(shortlists)
    results: list[dict[str, Any]] = []
    for features, data in _galleries(source, numbers(sizes), queries, root, checkpoint, cache):
        modulations = {
            _REAL: data.modulation,
            f"γ × (1 ± {gamma:g})": stronger(data.modulation, gamma),
        }
        engine = Engine(data.gallery, device)
        data = data._replace(gallery=data.gallery[:0])  # the engine has its own copy
        results += [
            {"features": features, "N": engine.count, **result}
            for result in _measure(engine, data.queries, modulations, lengths, timed, rounds)
        ]
    publish("recall", settings, *_table(results), results, json)
    if plot is not None:
        from service.bench.plots import draw_recall  # matplotlib, which only plots need

        draw_recall(results, plot)


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`: of every size, the fastest way that finds 99 % of the ten."""
    results = [
        r for r in report["results"] if (r["features"], r["modulation"]) == ("sampled", _REAL)
    ]
    for count in sorted({result["N"] for result in results}):
        good = [r for r in results if r["N"] == count and r["recall@10"] >= _GOOD]
        if not good:
            continue
        best = min(good, key=lambda r: r["seconds per query"]["median"])
        way = f"{best['index']} {best['setting']}".strip()
        yield Headline(
            f"two stages, {count:,} crops: recall@10 {best['recall@10']:.3f} by {way}, "
            f"shortlist of {best['C']}",
            duration(best["seconds per query"]),
            "exhaustive ranking",
            duration(best["exhaustive seconds per query"]),
            as_fast(inverse(best["share of exhaustive time"])),
        )


def _galleries(
    source: Source,
    sizes: Sequence[int],
    queries: int,
    roots: Sequence[Path] | None,
    checkpoint: Path,
    cache: Path | None,
) -> Iterator[tuple[str, Data]]:
    """What is searched, one at a time, with how its features were made."""
    if roots:
        crops = embedded(roots, Embedder(checkpoint), cache)
        yield "unmodified", unmodified(crops, _UNMODIFIED, queries, source.network)
    for count in sizes:
        yield "sampled", source.sample(count, queries)


def _measure(
    engine: Engine,
    x: Tensor,
    modulations: dict[str, Modulation],
    lengths: Sequence[int],
    timed: int,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """One result for every index, setting, shortlist length and modulation."""
    exact = {name: engine.exhaustive(x, m, TOP) for name, m in modulations.items()}
    identity = Modulation.identity(len(x), engine.dim)
    for index in engine.indexes():
        plain = _shortlists(index, x, identity, lengths)
        times = [_time(engine, index, x, modulations, length, timed, rounds) for length in lengths]
        for name, modulation in modulations.items():
            found = _shortlists(index, x, modulation, lengths)
            for place, (length, time) in enumerate(zip(lengths, times, strict=True)):
                yield {
                    "index": index.kind,
                    "setting": index.setting,
                    "C": length,
                    "bytes per item": index.bytes_per_item,
                    "modulation": name,
                    "recall@10": _recall(engine, x, modulation, found[place], exact[name]),
                    "recall@10 by unmodulated shortlist": _recall(
                        engine, x, modulation, plain[place], exact[name]
                    ),
                    **time,
                }


def _shortlists(
    index: Index, x: Tensor, modulation: Modulation, lengths: Sequence[int]
) -> list[list[Positions]]:
    """Of every length, one shortlist per query."""
    projected = project(x.double(), Modulation(*(p.double() for p in modulation)))[0]
    if not index.nested:
        return [[index.search(w, length) for w in projected] for length in lengths]
    longest = [index.search(w, max(lengths)) for w in projected]
    return [[found[:length] for found in longest] for length in lengths]


def _recall(
    engine: Engine,
    x: Tensor,
    modulation: Modulation,
    shortlists: Sequence[Positions],
    exact: Sequence[Positions],
) -> float:
    """The share of the exhaustive ten that are among the best ten of the shortlist, on average."""
    shares = []
    for q, (shortlist, best) in enumerate(zip(shortlists, exact, strict=True)):
        found = engine.rescored(x[q : q + 1], _of(modulation, q), shortlist, TOP)
        shares.append(len(np.intersect1d(found, best)) / len(best))
    return float(np.mean(shares))


@torch.inference_mode()
def _time(
    engine: Engine,
    index: Index,
    x: Tensor,
    modulations: dict[str, Modulation],
    length: int,
    timed: int,
    rounds: int,
) -> dict[str, Spread]:
    """Seconds per single query of both ways, in turn, and the share of one in the other."""
    modulation = next(iter(modulations.values()))

    ours, theirs = min(timed, len(x)), min(_TIMED_EXHAUSTIVE, len(x))

    def two_stage(queries: int) -> None:
        for q in range(queries):
            engine.two_stage(x[q : q + 1], _of(modulation, q), index.search, length, TOP)

    def exhaustive(queries: int) -> None:
        for q in range(queries):
            engine.exhaustive(x[q : q + 1], _of(modulation, q), TOP)

    two_stage(1)
    exhaustive(1)
    short, full = [], []
    for _ in range(rounds):
        short.append(seconds(lambda: two_stage(ours)) / ours)
        full.append(seconds(lambda: exhaustive(theirs)) / theirs)
    return {
        "seconds per query": Spread.of(short),
        "exhaustive seconds per query": Spread.of(full),
        "share of exhaustive time": Spread.of([s / f for s, f in zip(short, full, strict=True)]),
    }


def _of(modulation: Modulation, q: int) -> Modulation:
    return Modulation(*(parameter[q : q + 1] for parameter in modulation))


def _table(
    results: Sequence[dict[str, Any]],
) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Columns and rows; the modulations of one index and length stand side by side."""
    places: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for result in results:
        index = f"{result['index']} {result['setting']}".strip()
        place: tuple[object, ...] = (result["features"], f"{result['N']:,}", index, result["C"])
        places.setdefault(place, []).append(result)
    rows = []
    for key, of in places.items():
        time = of[0]["seconds per query"]
        rows.append(
            (
                *key,
                *(f"{r['recall@10']:.3f}" for r in of),
                *(f"{r['recall@10 by unmodulated shortlist']:.3f}" for r in of),
                Spread(*(1e3 * t for t in (time.median, time.least, time.most))),
                of[0]["share of exhaustive time"],
            )
        )
    names = list(dict.fromkeys(result["modulation"] for result in results))
    columns = (
        *("features", "N", "index", "shortlist"),
        *(f"recall@10, {name}" for name in names),
        *(f"by unmodulated, {name}" for name in names),
        *("ms per query", "share of exhaustive time"),
    )
    return columns, rows
