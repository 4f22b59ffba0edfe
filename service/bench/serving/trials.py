"""The rounds of `cmt bench serve`: the bare model, the service and its rivals in turn."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from model.benchmark import Spread, seconds
from model.pixels import pixels_of
from service.bench.crops import decoded, image_files
from service.bench.serving.figures import CORRECTION, cores, corrected_rate, percentiles
from service.bench.serving.filling import fill
from service.bench.serving.load import HOST, Load, measure
from service.bench.serving.rivals import (
    OVERLOADED,
    TENFOLD,
    Batching,
    Rival,
    batching,
    is_installed,
    overload,
    rival,
    service,
    started,
)
from service.bench.serving.trace import summary, trace
from service.client import Client
from service.embedding.embedder import Embedder

_BATCHES = {"cpu": (1, 8, 32), "cuda": (1, 8, 32, 128)}  # of the bare model
_TRACED = 100  # lone queries whose stages are asked for, a round

Key = tuple[str, str, int]  # side, route, clients


class Trials:
    """A filled data folder, and what all rounds on it measured.

    folder: an empty one, in which the service's data folders are made. queries, crops: folders.
    """

    def __init__(
        self, folder: Path, checkpoint: Path, embedder: Embedder, queries: Path, crops: Path
    ) -> None:
        self._folder, self._checkpoint, self._embedder = folder, checkpoint, embedder
        self._queries, self._crops = image_files(queries), image_files(crops)
        self._gallery = 0  # items in it
        self._precision = ""
        batches = _BATCHES[torch.device(embedder.device).type]
        self._bare: dict[int, list[float]] = {batch: [] for batch in batches}  # images/s
        self._loads: dict[Key, list[Load]] = {}
        self._traced: list[dict[str, float]] = []  # ms of the stages of lone queries

    def fill(self, count: int) -> None:
        """Enroll the crops, as often as they are needed, each time with a little noise."""
        self._gallery = count
        fill(self._folder / "filled", self._embedder, self._crops, count)

    def round(
        self,
        clients: Sequence[int],
        duration: float,
        against: Sequence[Rival],
        batchings: Sequence[Batching] = (),
        places: int | None = None,
    ) -> None:
        """All sides once; the service on a fresh copy of the filled folder."""
        self._measure_bare(duration)
        data_dir = self._folder / "data"
        shutil.copytree(self._folder / "filled", data_dir)
        embedder = self._embedder
        ours = service(self._checkpoint, embedder, data_dir, self._queries, self._crops)
        # `ours` comes after the others of its kind: its enrollments make the gallery grow.
        servers = [*(batching(ours, how) for how in batchings), ours]
        if places is not None:
            servers.insert(0, overload(ours, places))
        servers += [
            rival(kind, self._checkpoint, embedder, self._queries, self._gallery)
            for kind in against
            if is_installed(kind)
        ]
        for server in servers:
            with started(server, self._folder / "log") as port:
                for route in server.routes:
                    for count in server.clients or clients:
                        load = measure(port, route.path, route.files, count, duration)
                        key = server.side, route.name, count
                        self._loads.setdefault(key, []).append(load)
                    if server is ours and route.path == "/query":
                        self._trace(port)
        shutil.rmtree(data_dir)

    def results(self) -> list[dict[str, Any]]:
        """A row for every batch size of the bare model, then one for every load."""
        facts = {
            "runtime": self._embedder.runtime,
            "precision": self._precision,
            "cores": cores(),
            "correction": CORRECTION,
            "servers": _servers(),
        }
        rates = {batch: Spread.of(rates) for batch, rates in self._bare.items()}
        best = max(rates, key=lambda batch: rates[batch].median)
        rows: list[dict[str, Any]] = [
            {"side": "bare model", "batch": batch, "images per second": rate, **facts}
            for batch, rate in rates.items()
        ]
        for (side, route, clients), loads in self._loads.items():
            row = {"side": side, "route": route, "clients": clients}
            row |= _figures(loads, self._bare[best])
            if (side, route, clients) == ("ours", "POST /query", 1):
                row["ms over the bare model"] = self._overhead(loads)
                row |= summary(self._traced, 1e3 / rates[1].median)
            saturating = self._loads.get((side, route, clients // TENFOLD))
            if side.startswith(OVERLOADED) and saturating is not None:
                row |= _beside_saturation(loads, saturating)
            rows.append({**row, **facts})
        return rows

    def _measure_bare(self, duration: float) -> None:
        """The network on decoded tensors, as often as the time allows."""
        crops = islice(cycle(decoded(self._queries)), max(self._bare))
        pixels = pixels_of([crop.image for crop in crops], self._embedder.info.config)
        for batch, rates in self._bare.items():
            part = pixels[:batch]
            self._embedder.backend(part, "ir")  # warm up
            calls, taken = 0, 0.0
            while taken < duration / len(self._bare):
                taken += seconds(lambda part=part: self._embedder.backend(part, "ir"))  # type: ignore[misc]
                calls += 1
            rates.append(batch * calls / taken)

    def _trace(self, port: int) -> None:
        """Collect the stages of lone queries, and ask for the precision."""
        with Client(f"http://{HOST}:{port}") as client:
            self._precision = client.model().precision
        self._traced += trace(port, self._queries, _TRACED)

    def _overhead(self, loads: Sequence[Load]) -> Spread:
        """p50 of a query from one client, less the time of the network on one image."""
        return Spread.of(
            [
                1e3 * (percentiles(load.latencies)["p50"] - 1 / rate)
                for load, rate in zip(loads, self._bare[1], strict=True)
            ]
        )


def _figures(loads: Sequence[Load], bare: Sequence[float]) -> dict[str, Any]:
    """Spreads over the rounds; bare: the best rate of the bare model in each."""
    raw = [len(load.latencies) / load.seconds for load in loads]
    corrected = [
        corrected_rate(len(load.latencies), load.seconds, load.cpu_seconds, cores())
        for load in loads
    ]
    errors: Counter[str] = Counter()
    for load in loads:
        errors.update(load.errors)
    quantiles = [percentiles(load.latencies) for load in loads]
    return {
        "requests": sum(len(load.latencies) for load in loads),
        "requests per second": Spread.of(raw),
        "requests per second, corrected": Spread.of(corrected),
        "share of the bare model": Spread.of(
            [rate / ceiling for rate, ceiling in zip(corrected, bare, strict=True)]
        ),
        **{f"{q}, ms": Spread.of([1e3 * each[q] for each in quantiles]) for q in quantiles[0]},
        "errors": errors,
        "CPU seconds of the load generator": Spread.of([load.cpu_seconds for load in loads]),
    }


def _beside_saturation(loads: Sequence[Load], saturating: Sequence[Load]) -> dict[str, Spread]:
    """What of the service is left, round by round, where ten times as many clients come."""
    rounds = list(zip(loads, saturating, strict=True))
    p99 = [percentiles(a.latencies)["p99"] / percentiles(b.latencies)["p99"] for a, b in rounds]
    rate = [len(a.latencies) * b.seconds / len(b.latencies) / a.seconds for a, b in rounds]
    return {
        "p99, times that at saturation": Spread.of(p99),
        "rate, times that at saturation": Spread.of(rate),
    }


def _servers() -> dict[str, str]:
    """Versions of what serves; uvicorn takes uvloop and httptools where they are installed."""
    names = "uvicorn", "uvloop", "httptools", "litserve"
    return {name: version(name) for name in names if find_spec(name)}
