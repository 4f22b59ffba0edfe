"""A load generator in a process of its own: uploads over persistent connections.

Every client has one connection and one request in flight. Only asyncio's streams are used: a
generator that computes little takes little CPU time from the server, and it reports how much.

It is started as `python -m service.bench.serving.load`, with a `Job` as JSON on standard input; the
`Load` comes out as JSON.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path

HOST = "127.0.0.1"
WARM_UP = 0.5  # of the measured time, before it
_PAUSE = 0.05  # seconds after a failure, so that a server that refuses is not flooded
_PATIENCE = 120.0  # seconds beyond its time until a generator that does not end is killed
_BOUNDARY = "cmt-bench-boundary"


class LoadError(Exception):
    """No load could be measured; the message says the remedy."""


@dataclass(frozen=True)
class Job:
    """What to send: files in turn, as the form's part `image`, by so many clients at once."""

    port: int
    path: str
    files: list[str]
    clients: int
    seconds: float


@dataclass
class Load:
    """What came back within `seconds`.

    latencies: seconds of every request that succeeded, from its first byte to the answer's last.
    errors: how many requests failed, by status ("connection" where there was none). cpu_seconds:
    what the generator itself used in that time.
    """

    latencies: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def measure(port: int, path: str, files: Sequence[Path], clients: int, seconds: float) -> Load:
    """Run a generator for `seconds`, after a warm-up. Raises LoadError."""
    job = Job(port, path, [str(file) for file in files], clients, seconds)
    try:
        generator = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(asdict(job)),
            capture_output=True,
            text=True,
            timeout=(1 + WARM_UP) * seconds + _PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"{path} did not answer all requests; see the server's log") from error
    if generator.returncode:
        reason = (generator.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise LoadError(f"the load generator failed ({reason}); this is a bug, please report it")
    load = Load(**json.loads(generator.stdout))
    if not load.latencies:
        failures = ", ".join(f"{n}× {status}" for status, n in load.errors.items()) or "none failed"
        raise LoadError(
            f"no request to {path} succeeded within {seconds:g} s ({failures}); give more --seconds"
        )
    return load


async def generate(job: Job) -> Load:
    """Send requests, and count those that end within the measured time."""
    run = _Run(job)
    async with asyncio.TaskGroup() as clients:
        for _ in range(job.clients):
            clients.create_task(run.client())
        await asyncio.sleep(WARM_UP * job.seconds)
        began, cpu = time.perf_counter(), time.process_time()
        run.measuring = True
        await asyncio.sleep(job.seconds)
        run.measuring = False
        run.load.seconds = time.perf_counter() - began
        run.load.cpu_seconds = time.process_time() - cpu
        run.ended = True
    return run.load


class _Run:
    """What the clients share. measuring: whether a request that ends now counts."""

    def __init__(self, job: Job) -> None:
        self._port = job.port
        self._requests: Iterator[bytes] = cycle(
            [request(job.path, Path(file).read_bytes()) for file in job.files]
        )
        self.load = Load()
        self.measuring = self.ended = False

    async def client(self) -> None:
        """One request after the other until the end, on a new connection where one was lost."""
        while not self.ended:
            try:
                reader, writer = await asyncio.open_connection(HOST, self._port)
                try:
                    await self._converse(reader, writer)
                finally:
                    writer.close()
            except (OSError, asyncio.IncompleteReadError):
                await self._failed("connection")

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stays = True
        while stays and not self.ended:
            sent = time.perf_counter()
            writer.write(next(self._requests))
            status, stays = await _answer(reader)
            if not 200 <= status < 300:
                await self._failed(str(status))
            elif self.measuring:
                self.load.latencies.append(time.perf_counter() - sent)

    async def _failed(self, status: str) -> None:
        if self.measuring:
            self.load.errors[status] = self.load.errors.get(status, 0) + 1
        await asyncio.sleep(_PAUSE)


def request(path: str, image: bytes, fields: Mapping[str, str] | None = None) -> bytes:
    """A POST with the image as the form's part `image`, as HTTP/1.1 writes it, after `fields`."""
    body = b"".join(
        (
            *(
                f"--{_BOUNDARY}\r\nContent-Disposition: form-data; "
                f'name="{name}"\r\n\r\n{text}\r\n'.encode()
                for name, text in (fields or {}).items()
            ),
            f"--{_BOUNDARY}\r\n".encode(),
            b'Content-Disposition: form-data; name="image"; filename="image"\r\n',
            b"Content-Type: application/octet-stream\r\n\r\n",
            image,
            f"\r\n--{_BOUNDARY}--\r\n".encode(),
        )
    )
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\n"
        f"Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Read one answer → its status, and whether the connection stays open."""
    head = await reader.readuntil(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if line)
    await reader.readexactly(int(headers["content-length"]))
    return int(status_line.split()[1]), headers.get("connection") != "close"


def main() -> None:
    """Read the job, do it, write the load."""
    job = Job(**json.load(sys.stdin))
    json.dump(asdict(asyncio.run(generate(job))), sys.stdout)


if __name__ == "__main__":
    main()
