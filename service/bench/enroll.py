"""Bulk enrollment, from a folder to durable rows, against embedding alone."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from model.benchmark import Spread, publish, seconds
from model.benchmark_table import Headline, as_fast, rate
from model.device import DEVICES
from model.outputs import ResultsFile
from service.bench.crops import BenchmarkDataError, decoded, image_files
from service.bench.data import CHECKPOINT
from service.bench.networks import NetworkOption, Weights, checkpoint_of, named
from service.client import Client
from service.client.bulk import send
from service.client.stream import Entry
from service.embedding.embedder import Embedder, Runtime
from service.gallery import Gallery, Item, NewItem
from service.images.decode import Crop
from service.server import running
from service.settings import load_settings

T = TypeVar("T")

QUICK = ("--count", "256", "--rounds", "2")
_ALONE = "embedding alone"
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
    json: ResultsFile = None,
) -> None:
    """Images a second from files to durable rows, against embedding the decoded images alone.

    Offline: files are read and decoded ahead, embedded and stored in batches. Through the service:
    what cmt enroll does, by HTTP, to a service in this process.

    Example: cmt bench enroll --images synth-sysu/cam1 --count 1000
    """
    settings = {
        **named(checkpoint, network),
        "images": str(images),
        "count": count,
        "batch": batch,
        "rounds": rounds,
        "device": device,
        "runtime": runtime,
    }
    with tempfile.TemporaryDirectory() as name, checkpoint_of(checkpoint, network) as path:
        folder, embedder = Path(name), Embedder(path, device, runtime)
        files = _copies(images, count, folder / "alone")
        batches = _batches(decoded(files), batch)
        serving = load_settings(
            checkpoint=path,
            data_dir=folder / "service",
            port=0,
            device=device,
            runtime=runtime,
        )
        offline = Gallery.open(folder / "offline", embedder.info, device=embedder.device)
        with running(serving) as url, Client(url) as client:

            def sides(fresh: Path) -> dict[str, Callable[[], object]]:
                """What runs in a round, on files that no earlier round has enrolled."""
                copies = _copies(images, count, fresh)
                return {
                    _ALONE: lambda: [embedder.embed(crops) for crops in batches],
                    "offline": lambda: enroll_files(copies, embedder, offline, batch),
                    "through the service": lambda: _send(client, copies),
                }

            times: dict[str, list[float]] = {}
            for round_ in range(rounds + 1):
                for side, call in sides(folder / str(round_)).items():
                    taken = seconds(call)
                    if round_:  # the first one warms up
                        times.setdefault(side, []).append(taken)
            durable = len(offline), client.list(limit=1).total
        offline.close()
        embedder.close()
    if durable != ((rounds + 1) * count,) * 2:
        raise BenchmarkDataError(f"{durable} items are stored; this is a bug, please report it")
    results = [
        {
            "side": side,
            "images": count,
            "images per second": Spread.of([count / t for t in taken]),
            "share of embedding alone": Spread.of(
                [alone / t for alone, t in zip(times[_ALONE], taken, strict=True)]
            ),
            "runtime": embedder.runtime,
        }
        for side, taken in times.items()
    ]
    columns = ("", "images", "images/s", "share of embedding alone", "runtime")
    publish("enroll", settings, columns, [tuple(r.values()) for r in results], results, json)


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`."""
    network = report["settings"].get("network", "the demo's network")
    rates = {result["side"]: result["images per second"] for result in report["results"]}
    for result in report["results"]:
        if result["side"] != _ALONE:
            yield Headline(
                f"enrollment, {network}, {result['side']}",
                rate(result["images per second"], "crops"),
                _ALONE,
                rate(rates[_ALONE], "crops"),
                as_fast(result["share of embedding alone"]),
            )


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


def _send(client: Client, files: Sequence[Path]) -> None:
    failures = send(client, [Entry(file) for file in files])
    if failures:
        raise BenchmarkDataError(f"{failures[0].file} was not enrolled: {failures[0].reason}")


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
