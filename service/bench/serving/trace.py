"""Where the time of a lone query goes: the stages that the service tells, and what is outside.

A client that computes next to nothing sends one query after the other over one connection. From its
clock and the service's follows what no stage holds: the sockets, the parsing of HTTP, the log line.
"""

from __future__ import annotations

import json
import socket
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from model.benchmark import Spread
from service.bench.serving.load import HOST, request

OUTSIDE, WHOLE = "outside the service", "client"
_WARM_UP = 10  # queries before those that count
_FIELDS = {"rerank": "none", "debug": "true"}


def trace(port: int, files: Sequence[Path], count: int) -> list[dict[str, float]]:
    """Milliseconds of the stages of `count` queries: their sum is what `client` has waited."""
    sent = cycle([request("/query", file.read_bytes(), _FIELDS) for file in files])
    found = []
    with socket.create_connection((HOST, port)) as connection:
        for query in islice(sent, _WARM_UP + count):
            began = time.perf_counter()
            connection.sendall(query)
            body = _answer(connection)
            waited = 1e3 * (time.perf_counter() - began)
            stages: dict[str, float] = json.loads(body)["timings_ms"]
            total = stages.pop("total")
            found.append({**stages, OUTSIDE: waited - total, WHOLE: waited})
    return found[_WARM_UP:]


def summary(queries: Sequence[Mapping[str, float]], bare: float) -> dict[str, Any]:
    """The spread of every stage, and of what is neither decoding nor the bare model's `bare` ms."""
    rest = [query[WHOLE] - query["decode"] - bare for query in queries]
    sums = [sum(query.values()) - 2 * query[WHOLE] for query in queries]
    return {
        "stages, ms": {stage: _spread([one[stage] for one in queries]) for stage in queries[0]},
        "bare model, ms": bare,
        "neither decoding nor the bare model, ms": _spread(rest),
        "in no stage, ms": max(map(abs, sums)),
    }


def rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A `summary` as lines of a table: a stage, and its median with the middle half of queries."""
    yield from ((stage, str(spread)) for stage, spread in result["stages, ms"].items())
    yield "the bare model in a loop", f"{result['bare model, ms']:.3g}"
    named = "neither decoding nor the bare model"
    yield named, str(result[f"{named}, ms"])
    yield "in no stage, at most", f"{result['in no stage, ms']:.2g}"


def _spread(values: Sequence[float]) -> Spread:
    """Median and quartiles: of hundreds of queries the extremes are those of the machine."""
    if len(values) < 2:
        return Spread.of(values)
    low, median, high = statistics.quantiles(values, n=4)
    return Spread(median, low, high)


def _answer(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += _some(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").lower().split("\r\n")
    if status.split()[1] != "200":
        raise RuntimeError(f"a query was answered with {status}")
    length = int(dict(line.split(": ", 1) for line in lines)["content-length"])
    while len(body) < length:
        body += _some(connection)
    return body


def _some(connection: socket.socket) -> bytes:
    received = connection.recv(1 << 16)
    if not received:
        raise ConnectionError("the service closed the connection of a query")
    return received
