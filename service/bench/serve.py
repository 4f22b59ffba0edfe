"""HTTP throughput and latency of the service, against the bare model and against other servers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from model.benchmark import publish
from model.benchmark_table import Headline, as_fast, duration, inverse, rate, ratio_of
from model.device import DEVICES
from model.outputs import ResultsFile, picture_option
from model.terminal import Console, say
from service.bench.data import CHECKPOINT, numbers
from service.bench.networks import NetworkOption, Weights, checkpoint_of, named
from service.bench.serving.rivals import TENFOLD, Batching, Rival, is_installed
from service.bench.serving.trace import rows
from service.bench.serving.trials import Trials
from service.embedding.embedder import Embedder
from service.embedding.verdict import Runtime
from service.kit.text import counted

QUICK = ("--seconds", "2", "--rounds", "1")
_RATE = "requests per second, corrected"
_P99, _LEFT = "p99, times that at saturation", "rate, times that at saturation"


def serve(
    checkpoint: Weights = CHECKPOINT,
    network: NetworkOption = None,
    queries: Annotated[Path, typer.Option(help="Folder of infrared crops to query with.")] = (
        Path("examples/queries")
    ),
    crops: Annotated[Path, typer.Option(help="Folder of visible crops to enroll.")] = (
        Path("examples/gallery")
    ),
    gallery: Annotated[int, typer.Option(min=1, help="Items in the gallery of a query.")] = 10_000,
    clients: Annotated[str, typer.Option(help="Numbers of clients, comma-separated.")] = "1,8,32",
    seconds: Annotated[
        float,
        typer.Option(min=0.1, help="How long each is measured, after half of that unmeasured."),
    ] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="How often all sides run, in turn.")] = 3,
    against: Annotated[list[Rival] | None, typer.Option(help="One of them; default all.")] = None,
    batching: Annotated[
        list[Batching] | None,
        typer.Option(
            parser=Batching.parse,
            metavar="SIZE:SECONDS",
            help="Queries also with this max_batch and batch_wait, such as 8:0.005.",
        ),
    ] = None,
    overload: Annotated[
        int,
        typer.Option(
            min=0,
            help="Queries also with so many places (max_pending): by as many clients, and by ten "
            "times as many, most of whom are refused. 0: not at all.",
        ),
    ] = 64,
    device: Annotated[str, typer.Option(help=f"{DEVICES}.")] = "auto",
    runtime: Annotated[Runtime, typer.Option(help="auto, torch or openvino.")] = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="Draw latency and throughput here.", callback=picture_option)
    ] = None,
    json: ResultsFile = None,
) -> None:
    """Measure POST /query and POST /gallery over HTTP, against the bare model and other servers.

    The bare model is the service's network called in a loop on decoded tensors, at the best batch
    size of 1, 8, 32 and, on a GPU, 128: the ceiling. The other servers do less than the service:
    they decode an upload with Pillow, embed it with the same Embedder on the same device and
    runtime, and answer the norm. Naive FastAPI does so request by request, LitServe in dynamic
    batches. Naive FastAPI also ranks (POST /rank): as many rows in memory, modulated for every
    query as in the paper. Each server and the load generator run in processes of their own, one at
    a time, all in turn.

    Of a lone query, without re-ranking, all stages are told: from the client's clock and the
    service's, so that nothing is left out, beside the time of the bare model on one image.

    Ten times the load: the service's queries by as many clients as it has places, which saturate
    it, and by ten times as many, who come again 50 ms after they were refused.

    Requests a second are given as they were, and corrected for the generator's share of this
    machine: requests / (seconds − CPU seconds of the generator / cores). Shares of the bare model
    are the corrected rate's; they mean something where all cores are busy.

    Example: cmt bench serve --clients 1,32 --seconds 5
    """
    settings = {
        **named(checkpoint, network),
        **{"queries": str(queries), "crops": str(crops), "gallery": gallery},
        **{"clients": clients, "seconds": seconds, "rounds": rounds},
        **({"against": " --against ".join(against)} if against else {}),
        **({"batching": " --batching ".join(map(str, batching))} if batching else {}),
        **{"overload": overload, "device": device, "runtime": runtime},
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoint_of(checkpoint, network) as path,
        closing(Embedder(path, device, runtime)) as embedder,
    ):
        trials = Trials(Path(folder), path, embedder, queries, crops)
        trials.fill(gallery)
        for _ in range(rounds):
            trials.round(
                numbers(clients), seconds, list(against or Rival), batching or (), overload or None
            )
        results = trials.results()
    publish("serve", settings, _COLUMNS, list(_rows(results)), results, json)
    for result in results:
        if "stages, ms" in result:
            table = Table("a lone query", "ms: median (middle half)", title="rerank=none")
            for row in rows(result):
                table.add_row(*row)
            Console().print(table)
    for line in (*_against(results), *_overloaded(results)):
        say(line)
    for missing in (kind for kind in against or Rival if not is_installed(kind)):
        say(f"{missing} is not installed and was left out; install the extra 'bench'")
    if plot is not None:
        from service.bench.plots import draw_serve  # matplotlib, which only plots need

        draw_serve(results, plot)


_COLUMNS = (
    *("", "route", "clients", "requests/s", "corrected", "of the bare model"),
    *("p50, ms", "p95", "p99", "errors"),
)


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`: queries and enrollments beside every other server."""
    network = report["settings"].get("network", "the demo's network")
    served = [result for result in report["results"] if "route" in result]
    for ours in (result for result in served if result["side"] == "ours"):
        for theirs in served:
            if theirs["clients"] != ours["clients"] or theirs["side"].startswith("ours"):
                continue
            if theirs["route"] == "POST /embed" or ours["route"] == "POST /query":
                yield Headline(
                    f"{ours['route']}, {network}, {counted(ours['clients'], 'client')}",
                    rate(ours[_RATE], "requests"),
                    f"{theirs['side']}, {theirs['route']}",
                    rate(theirs[_RATE], "requests"),
                    as_fast(ratio_of(ours[_RATE], theirs[_RATE])),
                )
    for many in (result for result in served if _P99 in result):
        few = next(
            one
            for one in served
            if one["side"] == many["side"] and one["clients"] * TENFOLD == many["clients"]
        )
        p99s = (_in_seconds(one["p99, ms"]) for one in (many, few))
        yield Headline(
            f"{many['route']}, {network}, p99 at ten times the load",
            duration(next(p99s)),
            f"at saturation, {counted(few['clients'], 'client')}",
            duration(next(p99s)),
            as_fast(inverse(many[_P99])),
        )


def _in_seconds(spread: dict[str, float]) -> dict[str, float]:
    return {key: value / 1e3 for key, value in spread.items()}


def _rows(results: Sequence[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    for r in results:
        if "batch" in r:
            yield (r["side"], f"batch {r['batch']}", "", r["images per second"], *[""] * 6)
            continue
        yield (
            *(r["side"], r["route"], r["clients"]),
            r["requests per second"],
            f"{r['requests per second, corrected'].median:.4g}",
            f"{r['share of the bare model'].median:.0%}",
            *(f"{r[f'{q}, ms'].median:.3g}" for q in ("p50", "p95", "p99")),
            ", ".join(f"{count}× {status}" for status, count in r["errors"].items()) or 0,
        )


def _against(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The service's queries beside those that only embed, by the corrected rates."""
    loads = [r for r in results if "route" in r]
    rates = {(r["side"], r["route"], r["clients"]): r[_RATE].median for r in loads}
    for side, route in dict.fromkeys((r["side"], r["route"]) for r in loads):
        shared = [
            (clients, ours / rates[side, route, clients])
            for (who, what, clients), ours in rates.items()
            if (who, what) == ("ours", "POST /query") and (side, route, clients) in rates
        ]
        if side != "ours" and shared:
            ratios = ", ".join(f"{ratio:.2f} with {clients}" for clients, ratio in shared)
            yield f"POST /query, times the rate of {side}, {route}: {ratios} clients"


def _overloaded(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What ten times the load leaves of the service."""
    for r in results:
        if _P99 in r:
            yield (
                f"{r['route']} at ten times the load ({counted(r['clients'], 'client')}): p99 "
                f"{r[_P99].median:.2f} times that at saturation, {r[_LEFT].median:.0%} of its rate"
            )
