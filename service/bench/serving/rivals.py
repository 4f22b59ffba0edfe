"""Servers of the benchmark: the service and what it is compared with, each in its own process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import httpx

from model.benchmark_table import CMT
from service.bench.serving.load import HOST
from service.embedding.embedder import Embedder

OVERLOADED = "ours, max_pending "
TENFOLD = 10  # times as many clients as saturate the service
_START = 600.0  # seconds; a large network takes a while to be converted
_END = 30.0


class ServerError(Exception):
    """A server of the benchmark did not start; the message says why."""

    @classmethod
    def ended(cls, side: str, log: Path, answer: str = "none") -> ServerError:
        """With the last line of what the server said."""
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it says nothing"]
        return cls(f"{side} did not start (answer {answer}): {last[0]}")


class Rival(StrEnum):
    """What the service may be compared with."""

    NAIVE = "naive"
    LITSERVE = "litserve"


@dataclass(frozen=True)
class Route:
    """What is sent where: files in turn, as the form's part `image`."""

    name: str
    path: str
    files: Sequence[Path]


@dataclass(frozen=True)
class Server:
    """A server to be measured.

    command: starts it, once the port is appended. routes: measured in this order. settings: of the
    service, by name, in addition to the command's.
    clients: numbers of clients of its own, in place of those that are asked for.
    """

    side: str
    command: tuple[str, ...]
    routes: tuple[Route, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    clients: tuple[int, ...] = ()


class Batching(NamedTuple):
    """A size of the service's micro-batches, and how long the first of one waits, in seconds."""

    max_batch: int
    batch_wait: float

    @classmethod
    def parse(cls, text: str) -> Batching:
        """SIZE:SECONDS. Raises ValueError."""
        size, _, wait = text.partition(":")
        return cls(int(size), float(wait or 0))

    def __str__(self) -> str:
        return f"{self.max_batch}:{self.batch_wait:g}"


def service(
    checkpoint: Path,
    embedder: Embedder,
    data_dir: Path,
    queries: Sequence[Path],
    crops: Sequence[Path],
) -> Server:
    """`cmt serve` on a data folder. The queries come first: enrollments make the gallery grow."""
    options = {
        "--checkpoint": checkpoint,
        "--data-dir": data_dir,
        "--host": HOST,
        "--device": embedder.device,
        "--runtime": embedder.runtime,
    }
    command = [*CMT, "serve"]
    command += [*(str(part) for option in options.items() for part in option), "--port"]
    routes = Route("POST /query", "/query", queries), Route("POST /gallery", "/gallery", crops)
    return Server("ours", tuple(command), routes)


def batching(ours: Server, how: Batching) -> Server:
    """The service's queries in batches of another kind."""
    side = f"ours, batches of {how.max_batch} after {how.batch_wait:g} s"
    return replace(ours, side=side, routes=ours.routes[:1], settings=how._asdict())


def overload(ours: Server, places: int) -> Server:
    """The service's queries with as many clients as it has places, and with ten times as many.

    places: `max_pending` of the service; who finds none is refused with 429.
    """
    return replace(
        ours,
        side=f"{OVERLOADED}{places}",
        routes=ours.routes[:1],
        settings={"max_pending": places},
        clients=(places, TENFOLD * places),
    )


def rival(
    kind: Rival, checkpoint: Path, embedder: Embedder, queries: Sequence[Path], gallery: int
) -> Server:
    """A server that embeds, on the same device and runtime.

    The naive one also ranks `gallery` rows as the paper does.
    """
    python, options = (sys.executable, "-m"), (str(checkpoint), embedder.device, embedder.runtime)
    embed, rank = (Route(f"POST {path}", path, queries) for path in ("/embed", "/rank"))
    if kind is Rival.LITSERVE:
        return Server("LitServe", (*python, "service.bench.serving.batching", *options), (embed,))
    command = (*python, "service.bench.serving.naive", *options, str(gallery))
    return Server("naive FastAPI", command, (embed, rank))


def is_installed(kind: Rival) -> bool:
    """Whether this environment can run it."""
    return kind is not Rival.LITSERVE or find_spec("litserve") is not None


def without_settings() -> dict[str, str]:
    """The environment without this project's settings, for a process that is measured."""
    return {name: v for name, v in os.environ.items() if not name.startswith("CMT_")}


@contextmanager
def started(server: Server, log: Path) -> Iterator[int]:
    """Run a server → its port, once it has answered a first request. Raises ServerError.

    log: as of `running`.
    """
    with running(server, log) as (process, port):
        _wait_for_answer(process, server, port, log)
        yield port


@contextmanager
def running(server: Server, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a server → its process, which is only beginning, and the port that it will listen on.

    log: file for its output. At the end its whole process group is killed.
    """
    port = _free_port()
    environment = without_settings() | {
        f"CMT_{name.upper()}": str(v) for name, v in server.settings.items()
    }
    # Without this OpenVINO sends telemetry, each event from a new process. Where these are spawned,
    # as in LitServe's worker, they keep the cores busy for half a minute.
    environment["CI"] = "true"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*server.command, str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process, port
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END)
        with suppress(ProcessLookupError):  # what a server leaves behind, or one that hangs
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_answer(
    process: subprocess.Popen[bytes], server: Server, port: int, log: Path
) -> None:
    """Wait until the first route answers its first file with success. Raises ServerError.

    While it starts it may answer that it is not ready; one that fails otherwise gets little time.
    """
    route = server.routes[0]
    image = route.files[0].read_bytes()
    until = time.monotonic() + _START
    answer = "none"
    with httpx.Client(base_url=f"http://{HOST}:{port}", trust_env=False, timeout=_START) as http:
        while time.monotonic() < until and process.poll() is None:
            with suppress(httpx.TransportError):
                response = http.post(route.path, files={"image": ("image", image)})
                if response.is_success:
                    return
                answer = str(response.status_code)
                if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    until = min(until, time.monotonic() + _END)
            time.sleep(0.1)
    raise ServerError.ended(server.side, log, answer)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
        return port
