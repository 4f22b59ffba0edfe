"""The service as several processes on this machine: shards on Ray, and replicas."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from model.benchmark import publish
from model.benchmark_table import Headline, as_fast, rate, ratio_of
from service.bench.data import numbers
from service.bench.serving.several import Processes
from service.embedding.embedder import Embedder
from service.kit.text import counted

_IMAGES = Path("examples/queries"), Path("examples/gallery")
_COLUMNS = ("", "route", "clients of each", "requests/s", "p50, ms", "p95", "p99", "errors")


class Plan(NamedTuple):
    """What is run, as the options of `cmt bench scale` say it."""

    shards: str | None
    replicas: str | None
    database_url: str | None
    items: int
    clients: str
    duration: float
    rounds: int


def scale_out(plan: Plan, checkpoint: Path, plot: Path | None, json: Path | None) -> None:
    """Measure each number of shards and of replicas, and publish what that gave."""
    settings = {name: value for name, value in plan._asdict().items() if value is not None}
    if settings.pop("database_url", None):
        settings["database-url"] = "…"  # whose it is says nothing about the figures
    settings["checkpoint"] = str(checkpoint)
    shards, replicas = numbers(plan.shards or ""), numbers(plan.replicas or "")
    with tempfile.TemporaryDirectory() as folder, closing(Embedder(checkpoint)) as embedder:
        processes = Processes(Path(folder), checkpoint, embedder, _IMAGES, plan.database_url)
        processes.fill(plan.items)
        for _ in range(plan.rounds):
            processes.round(shards, replicas, numbers(plan.clients), plan.duration)
        results = processes.results()
    publish("scale", settings, _COLUMNS, [_row(r) for r in results], results, json)
    if plot is not None:
        from service.bench.plots import draw_processes  # matplotlib, which only plots need

        draw_processes(results, plot)


def of_processes(results: Iterable[dict[str, Any]]) -> Iterator[Headline]:
    """Each number of shards or replicas beside the fewest that were measured."""
    fewest: dict[tuple[object, ...], dict[str, Any]] = {}
    for result in results:
        key = (result["kind"], result["route"], result["clients"])
        yield _beside(result, fewest.setdefault(key, result))


def _beside(result: dict[str, Any], fewest: dict[str, Any]) -> Headline:
    """A row of shards or replicas beside the fewest that were measured."""
    ours, theirs = (r["requests per second"] for r in (result, fewest))
    each = counted(result["clients"], "client")
    what = f"{result['route']} by {_name(result)}, {each} of each"
    if result is fewest:
        return Headline(what, rate(ours, "requests"))
    return Headline(
        what,
        rate(ours, "requests"),
        _name(fewest),
        rate(theirs, "requests"),
        as_fast(ratio_of(ours, theirs)),
    )


def _name(result: dict[str, Any]) -> str:
    count, kind = result["processes"], result["kind"]
    return counted(count, kind.removesuffix("s")) if count else "one process, without Ray"


def _row(result: dict[str, Any]) -> tuple[object, ...]:
    return (
        *(_name(result), result["route"], result["clients"], result["requests per second"]),
        *(f"{result[f'{q}, ms'].median:.3g}" for q in ("p50", "p95", "p99")),
        ", ".join(f"{n}× {status}" for status, n in result["errors"].items()) or 0,
    )
