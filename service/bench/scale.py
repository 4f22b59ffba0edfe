"""Latency and memory of a search as the gallery grows."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from model import Modulation
from model.benchmark import Spread, publish, seconds
from model.benchmark_table import Headline, duration
from model.outputs import ResultsFile, picture_option
from service.bench.data import (
    CHECKPOINT,
    STATISTICS,
    Checkpoint,
    Source,
    Statistics,
    numbers,
)
from service.bench.engine import Engine
from service.bench.scale_out import Plan, of_processes, scale_out
from service.gallery.index.recall_index import choose_kind
from service.kit.host_memory import available_memory

QUICK = ("--sizes", "1000,10000,100000", "--computed", "", "--rounds", "2")
_TOP = 20
_BATCH = 32
_SINGLE = 8  # single queries a round
_WAYS = ("exhaustive, Q = 1", f"exhaustive, Q = {_BATCH}", "two stages, Q = 1")


def scale(
    sizes: Annotated[str, typer.Option(help="Gallery sizes N, comma-separated, rising.")] = (
        "1000,10000,100000,1000000"
    ),
    computed: Annotated[
        str, typer.Option(help="Sizes computed from the largest measured one; may be empty.")
    ] = "10000000",
    shortlist: Annotated[int, typer.Option(min=1, help="Candidates of the recall stage.")] = 256,
    dim: Annotated[
        int | None, typer.Option(help="Channels D; more than the checkpoint's: draws side by side.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often all ways run, in turn.")] = 5,
    statistics: Statistics = STATISTICS,
    checkpoint: Checkpoint = CHECKPOINT,
    shards: Annotated[
        str | None,
        typer.Option(help="Instead: the service with so many shards on Ray, such as 1,2,4."),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(help="Instead, or as well: so many replicas over --database-url, as 1,2,3."),
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(help="An empty PostgreSQL database; the replicas' items stay.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Items of shards and replicas.")] = 10_000,
    clients: Annotated[str, typer.Option(help="Clients of every server of theirs.")] = "1,8",
    duration: Annotated[
        float, typer.Option(min=0.1, help="Seconds of every load of theirs, after half of it.")
    ] = 5,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curves here.", callback=picture_option)
    ] = None,
    json: ResultsFile = None,
) -> None:
    """Measure latency (exhaustive and in two stages) and memory of galleries of growing size.

    Memory is what features and index took of the process. Rows marked as computed were not run:
    they are the largest measured ones, multiplied.

    With --shards or --replicas, requests a second and latencies of the service as several
    processes, on this one machine: the processes share its cores.

    Example: cmt bench scale --sizes 1000,10000 --plot scale.png
    """
    if shards or replicas:
        if replicas and database_url is None:
            raise typer.BadParameter("replicas share a PostgreSQL database; give --database-url")
        plan = Plan(shards, replicas, database_url, items, clients, duration, rounds)
        scale_out(plan, checkpoint, plot, json)
        return
    source = Source.load(statistics, checkpoint)
    dim = dim or source.population.dim
    settings = {
        **{"sizes": sizes, "computed": computed, "shortlist": shortlist},
        **{"dim": dim, "rounds": rounds},
        **{"statistics": str(statistics), "checkpoint": str(checkpoint)},
    }
    results = [_measure(source, count, dim, shortlist, rounds) for count in numbers(sizes)]
    results += [_computed(results[-1], count) for count in numbers(computed)]
    rows = [
        (
            f"{r['N']:,}" + (" (computed)" if r["computed"] else ""),
            *(_milliseconds(r["seconds"][way]) for way in _WAYS),
            f"{r['bytes'] / 2**20:,.0f}",
        )
        for r in results
    ]
    columns = ("N", *(f"{way}, ms" for way in _WAYS), "memory, MiB")
    publish("scale", settings, columns, rows, results, json)
    if plot is not None:
        from service.bench.plots import draw_scale  # matplotlib, which only plots need

        draw_scale(results, plot)


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`: what a search takes as the gallery, or the service, grows."""
    yield from of_processes(result for result in report["results"] if "processes" in result)
    for result in report["results"]:
        if not result.get("computed", True):
            for way, taken in result["seconds"].items():
                yield Headline(f"{result['N']:,} crops, {way}", duration(taken))


@torch.inference_mode()
def _measure(source: Source, count: int, dim: int, shortlist: int, rounds: int) -> dict[str, Any]:
    data = source.sample_wide(count, _BATCH, dim)
    x, modulation = data.queries, data.modulation
    before = _resident_bytes()
    engine = Engine(data.gallery)
    search = engine.searching(
        engine.index(choose_kind(count, "cpu", available_memory, engine.width))
    )
    occupied = _resident_bytes() - before
    del data

    def one(q: int) -> Modulation:
        return Modulation(*(parameter[q : q + 1] for parameter in modulation))

    def singles(stages: int) -> None:
        for q in range(_SINGLE):
            if stages == 1:
                engine.exhaustive(x[q : q + 1], one(q), _TOP)
            else:
                engine.two_stage(x[q : q + 1], one(q), search, shortlist, _TOP)

    calls: tuple[tuple[Callable[[], object], int], ...] = (
        (partial(singles, 1), _SINGLE),
        (partial(engine.exhaustive, x, modulation, _TOP), 1),
        (partial(singles, 2), _SINGLE),
    )
    for call, _ in calls:
        call()
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    for _ in range(rounds):
        for way, (call, times_in_call) in zip(_WAYS, calls, strict=True):
            times[way].append(seconds(call) / times_in_call)
    return {
        "N": count,
        "computed": False,
        "seconds": {way: Spread.of(taken) for way, taken in times.items()},
        "bytes": occupied,
    }


def _computed(largest: dict[str, Any], count: int) -> dict[str, Any]:
    """What `count` rows would take if time and memory grow in proportion."""
    factor = count / largest["N"]
    return {
        "N": count,
        "computed": True,
        "seconds": {way: _times(spread, factor) for way, spread in largest["seconds"].items()},
        "bytes": round(largest["bytes"] * factor),
    }


def _times(spread: Spread, factor: float) -> Spread:
    return Spread(*(factor * s for s in (spread.median, spread.least, spread.most)))


def _milliseconds(spread: Spread) -> Spread:
    return _times(spread, 1e3)


def _resident_bytes() -> int:
    """Memory of the process in bytes, without what it has freed and the allocator keeps."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    )
    return 1024 * int(line.split()[1])
