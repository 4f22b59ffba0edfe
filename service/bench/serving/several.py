"""The service as several processes: shards on Ray, and replicas over one PostgreSQL."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.benchmark import Spread
from service.bench.crops import image_files
from service.bench.serving.figures import percentiles
from service.bench.serving.filling import fill
from service.bench.serving.load import Load, measure
from service.bench.serving.rivals import Server, service, started
from service.embedding.embedder import Embedder
from service.settings import Settings

Key = tuple[str, int, str, int]  # kind, how many, route, clients


class Processes:
    """Gallery and servers of one checkpoint, and what all rounds on them measured.

    folder: an empty one. database_url: an empty PostgreSQL database, needed for replicas.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Path,
        embedder: Embedder,
        images: tuple[Path, Path],
        database_url: str | None,
    ) -> None:
        self._folder, self._checkpoint, self._embedder = folder, checkpoint, embedder
        self._queries, self._crops = map(image_files, images)
        self._database_url = database_url
        self._loads: dict[Key, list[list[Load]]] = {}

    def fill(self, count: int) -> None:
        """Enroll so many items in a folder, and in the database where there is one."""
        fill(self._folder / "filled", self._embedder, self._crops, count)
        if self._database_url is not None:
            own = self._folder / "replica"
            fill(own, self._embedder, self._crops, count, self._database_url)

    def round(
        self, shards: Sequence[int], replicas: Sequence[int], clients: Sequence[int], seconds: float
    ) -> None:
        """All of them once, in turn; replicas last, because their enrollments stay."""
        for count in (0, *shards) if shards else ():
            with self._sharded(count) as servers:
                self._measure("shards", count, servers, clients, seconds)
        for count in replicas:
            with self.replicated(count) as servers:
                self._measure("replicas", count, servers, clients, seconds)

    @contextmanager
    def replicated(self, count: int) -> Iterator[list[tuple[Server, int]]]:
        """Run so many replicas over the database → each with its port."""
        with ExitStack() as all_of_them:
            servers = []
            for place in range(count):
                settings = {"database_url": self._database_url}
                server = self._server(self._folder / f"replica-{place}", settings)
                port = all_of_them.enter_context(started(server, self._folder / f"log-{place}"))
                servers.append((server, port))
            yield servers

    def results(self) -> list[dict[str, Any]]:
        """A row for every load. Zero shards: the engine in the serving process itself."""
        return [
            {"kind": kind, "processes": count, "route": route, "clients": clients, **_figures(runs)}
            for (kind, count, route, clients), runs in self._loads.items()
        ]

    def _measure(
        self,
        kind: str,
        count: int,
        servers: Sequence[tuple[Server, int]],
        clients: Sequence[int],
        seconds: float,
    ) -> None:
        with ThreadPoolExecutor(len(servers)) as generators:
            for place, route in enumerate(servers[0][0].routes):
                for each in clients:
                    loads = [
                        generators.submit(
                            measure,
                            port,
                            route.path,
                            server.routes[place].files,
                            each,
                            seconds,
                        )
                        for server, port in servers
                    ]
                    key = kind, count, route.name, each
                    self._loads.setdefault(key, []).append([load.result() for load in loads])

    @contextmanager
    def _sharded(self, count: int) -> Iterator[list[tuple[Server, int]]]:
        data = self._folder / "data"
        shutil.copytree(self._folder / "filled", data)
        server = self._server(data, {"engine": "ray", "shards": count} if count else {})
        try:
            with started(server, self._folder / "log") as port:
                yield [(server, port)]
        finally:
            shutil.rmtree(data)

    def _server(self, data: Path, settings: Mapping[str, object]) -> Server:
        assert settings.keys() <= Settings.model_fields.keys()
        server = service(self._checkpoint, self._embedder, data, self._queries, self._crops)
        return replace(server, settings=settings)


def _figures(runs: Sequence[Sequence[Load]]) -> dict[str, Any]:
    """Spreads over the rounds, each of which has a load for every server."""
    errors: Counter[str] = Counter()
    for load in (load for loads in runs for load in loads):
        errors.update(load.errors)
    quantiles = [percentiles([s for load in loads for s in load.latencies]) for loads in runs]
    rates = [sum(len(load.latencies) / load.seconds for load in loads) for loads in runs]
    return {
        "requests per second": Spread.of(rates),
        **{f"{q}, ms": Spread.of([1e3 * each[q] for each in quantiles]) for q in quantiles[0]},
        "errors": errors,
    }
