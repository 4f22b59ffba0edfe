"""Bulk enrollment, from a folder to durable rows, against embedding alone."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import typer

from model.benchmark import Spread, publish, seconds
from model.benchmark_table import Headline, as_fast, rate
from model.device import DEVICES
from model.outputs import ResultsFile
from service.bench.crops import BenchmarkDataError, decoded, image_files
from service.bench.data import CHECKPOINT, numbers
from service.bench.networks import NetworkOption, Weights, checkpoint_of, named
from service.bench.serving.alone import seconds_alone
from service.bench.serving.figures import CORRECTION, cores
from service.bench.serving.load import HOST
from service.bench.serving.rivals import service, started
from service.bench.serving.several import Processes
from service.client import Client
from service.client.stream import Entry
from service.embedding.embedder import Embedder
from service.embedding.verdict import Runtime
from service.gallery import Gallery, Item, NewItem
from service.images.decode import Crop
from service.kit.text import counted

T = TypeVar("T")


class Side(NamedTuple):
    """What is measured: its name, how many images at once, and what it is compared with."""

    name: str
    images: int
    reference: str


class Taken(NamedTuple):
    """Seconds of a round, and those of CPU time that the client took of the same cores."""

    seconds: float
    by_client: float = 0.0

    @property
    def corrected(self) -> float:
        """As if the client ran on another machine: see `corrected_rate`."""
        return self.seconds - self.by_client / cores()


Times = dict[Side, list[Taken]]
"""Of each round; what others are compared with comes before them."""

QUICK = ("--count", "256", "--rounds", "2")
_ALONE = "embedding alone"
_SHARE = "share of embedding alone"
_CORRECTED = "share of embedding alone, corrected"
_AHEAD = 2  # batches that are read while one is embedded


def enroll(
    checkpoint: Weights = CHECKPOINT,
    network: NetworkOption = None,
    images: Annotated[
        Path, typer.Option(help="Folder of crops, copied until there are enough.")
    ] = (Path("examples")),
    count: Annotated[int, typer.Option(min=1, help="Images of a round.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Images embedded and stored at once.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="How often all sides run, in turn.")] = 3,
    device: Annotated[str, typer.Option(help=f"{DEVICES}.")] = "auto",
    runtime: Annotated[Runtime, typer.Option(help="auto, torch or openvino.")] = "auto",
    replicas: Annotated[
        str | None,
        typer.Option(help="Instead: to so many replicas over --database-url, such as 1,2,3."),
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(help="An empty PostgreSQL database; the replicas' items stay.")
    ] = None,
    json: ResultsFile = None,
) -> None:
    """Images a second from files to durable rows, against embedding the decoded images alone.

    Offline: files are read and decoded ahead, embedded and stored in batches. Through the service:
    what cmt enroll does, by HTTP, to a service in a process of its own. The rate is what was
    measured; corrected, it leaves out the client's CPU time, for a client on another machine.

    With --replicas, what cmt enroll does with several addresses, --count images for each of them,
    against as many processes that embed the same number of decoded images at the same time and do
    nothing else: the sum of their rates on the same cores.

    Example: cmt bench enroll --images synth-sysu/cam1 --count 1000
    """
    if replicas and database_url is None:
        raise typer.BadParameter("replicas share a PostgreSQL database; give --database-url")
    settings = {
        **named(checkpoint, network),
        "images": str(images),
        "count": count,
        "batch": batch,
        "rounds": rounds,
        "device": device,
        "runtime": runtime,
        **({"replicas": replicas} if replicas else {}),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoint_of(checkpoint, network) as path,
        closing(Embedder(path, device, runtime)) as embedder,
    ):
        if replicas:
            servers = Processes(Path(folder), path, embedder, (images, images), database_url)
            times = _by_replicas(
                *(servers, Path(folder), path, embedder, images),
                *(count, batch, rounds, numbers(replicas)),
            )
        else:
            times = _to_one_service(Path(folder), path, embedder, images, count, batch, rounds)
    by_name = {side.name: taken for side, taken in times.items()}
    results: list[dict[str, Any]] = []
    for side, taken in times.items():
        rounds_of = list(zip(by_name[side.reference], taken, strict=True))
        results.append(
            {
                "side": side.name,
                "images": side.images,
                "images per second": Spread.of([side.images / t.seconds for t in taken]),
                _SHARE: Spread.of([alone.seconds / t.seconds for alone, t in rounds_of]),
                _CORRECTED: Spread.of([alone.seconds / t.corrected for alone, t in rounds_of]),
                "runtime": embedder.runtime,
                "correction": CORRECTION,
            }
        )
    columns = ("", "images", "images/s", _SHARE, "corrected", "runtime")
    rows = [tuple(result.values())[: len(columns)] for result in results]
    publish("enroll", settings, columns, rows, results, json)


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`."""
    network = report["settings"].get("network", "the demo's network")
    alone: dict[str, Any] = {}
    for result in report["results"]:
        if result["side"].startswith(_ALONE):  # what the sides that follow are compared with
            alone = result
            continue
        yield Headline(
            f"enrollment, {network}, {result['side']}",
            rate(result["images per second"], "crops"),
            alone["side"],
            rate(alone["images per second"], "crops"),
            as_fast(result[_SHARE]),
        )


def _to_one_service(
    folder: Path,
    checkpoint: Path,
    embedder: Embedder,
    images: Path,
    count: int,
    batch: int,
    rounds: int,
) -> Times:
    """Offline, and to one service. Raises BenchmarkDataError for what is lost."""
    batches = _batches(decoded(_copies(images, count, folder / "alone")), batch)
    files = image_files(images)
    server = service(checkpoint, embedder, folder / "service", files, files)
    offline = Gallery.open(folder / "offline", embedder.info, device=embedder.device)
    times: Times = {}
    with (
        closing(offline),
        started(server, folder / "log") as port,
        Client(f"http://{HOST}:{port}") as client,
    ):

        def sides(fresh: Path) -> dict[str, Callable[[], Taken]]:
            """What runs in a round, on files that no earlier round has enrolled."""
            copies = _copies(images, count, fresh)

            def alone() -> None:
                for crops in batches:
                    embedder.embed(crops)

            return {
                _ALONE: lambda: Taken(seconds(alone)),
                "offline": lambda: Taken(
                    seconds(lambda: enroll_files(copies, embedder, offline, batch))
                ),
                "through the service": lambda: _sent([client], copies),
            }

        for round_ in range(rounds + 1):
            for name, run in sides(folder / str(round_)).items():
                taken = run()
                if round_:  # the first one warms up
                    times.setdefault(Side(name, count, _ALONE), []).append(taken)
        durable = len(offline), client.list(limit=1).total
    if durable != ((rounds + 1) * count,) * 2:
        raise BenchmarkDataError(f"{durable} items are stored; this is a bug, please report it")
    return times


def _by_replicas(
    servers: Processes,
    folder: Path,
    checkpoint: Path,
    embedder: Embedder,
    images: Path,
    count: int,
    batch: int,
    rounds: int,
    replicas: Sequence[int],
) -> Times:
    """To so many replicas, each a process, and as many processes that embed alone."""
    same = folder / "alone"
    _copies(images, count, same)
    times: Times = {}
    for round_ in range(rounds):
        for several in replicas:
            alone = f"{_ALONE}, {counted(several, 'process', 'processes')} at the same time"
            taken = seconds_alone(several, checkpoint, embedder, batch, same)
            times.setdefault(Side(alone, several * count, alone), []).append(Taken(taken))
            copies = _copies(images, several * count, folder / f"{round_}-{several}")
            with ExitStack() as stack:
                clients = [
                    stack.enter_context(Client(f"http://{HOST}:{port}"))
                    for _, port in stack.enter_context(servers.replicated(several))
                ]
                sent = _sent(clients, copies)
            side = f"cmt enroll to {counted(several, 'replica')}"
            times.setdefault(Side(side, several * count, alone), []).append(sent)
    return times


def enroll_files(
    files: Sequence[Path], embedder: Embedder, gallery: Gallery, batch: int
) -> list[Item]:
    """Enroll files in order, `batch` in one transaction; reading and storing overlap embedding."""
    items: list[Item] = []
    waiting = deque(_batches(files, batch))
    read: deque[Future[list[Crop]]] = deque()
    stored: Future[list[Item]] | None = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        while waiting or read:
            while waiting and len(read) < _AHEAD:
                read.append(reader.submit(decoded, waiting.popleft()))
            crops = read.popleft().result()
            features = embedder.embed(crops)
            if stored is not None:
                items += stored.result()
            stored = writer.submit(gallery.add, [NewItem(crop) for crop in crops], features)
        if stored is not None:
            items += stored.result()
    return items


def _sent(services: Sequence[Client], files: Sequence[Path]) -> Taken:
    """Enroll the files as `cmt enroll` does. Raises BenchmarkDataError where one is not."""
    client, *others = services
    began, cpu_began = time.perf_counter(), time.process_time()  # of the client alone, now
    results = list(client.enroll_many((Entry(file) for file in files), others=others))
    taken = Taken(time.perf_counter() - began, time.process_time() - cpu_began)
    for file, result in zip(files, results, strict=True):
        if result.item is None:
            raise BenchmarkDataError(f"{file} was not enrolled: {result.reason}")
    return taken


def _copies(images: Path, count: int, folder: Path) -> list[Path]:
    """Copy the images to `count` files, repeating them: a path is enrolled only once."""
    found = image_files(images)
    folder.mkdir()
    return [
        Path(shutil.copy(file, folder / f"{place:06}{file.suffix}"))
        for place, file in enumerate(islice(cycle(found), count))
    ]


def _batches(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
