"""Logging never waits for whoever reads the log: lines without a place are dropped and counted."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from service.observability.log_queue import LATER, QueueHandler
from service.observability.logs import configure_logs, get_logger, log_often
from tests.service.processes import CMT, ENDING_SECONDS, STARTING_SECONDS, is_up, wait_for


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, __file__, 1, text, None, None)


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe that takes no byte more."""
    reader, writer = os.pipe()
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    fcntl.fcntl(writer, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    fcntl.fcntl(writer, fcntl.F_SETFL, flags)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_lines_arrive_in_order() -> None:
    stream = io.StringIO()
    handler = QueueHandler(stream)
    for number in range(100):
        handler.handle(record(str(number)))
    handler.flush()
    assert stream.getvalue().split() == [str(number) for number in range(100)]
    assert handler.dropped == 0


def test_what_a_full_pipe_does_not_take_is_dropped_and_told(full_pipe: tuple[int, int]) -> None:
    reader, writer = full_pipe
    with os.fdopen(os.dup(writer), "w") as stream:
        handler = QueueHandler(stream, lines=3)
        handler.handle(record("first"))
        wait_for(lambda: handler._writing, "no thread writes")
        for number in range(10):  # three find a place; nobody waits
            handler.handle(record(f"line {number}"))
        assert handler.dropped == 7
        read = b""
        while b"line 2\n" not in read:
            read += os.read(reader, 1 << 20)
        handler.flush()
        told = b"7 lines of the log were dropped: standard error was not read"
        assert read.lstrip(b"x").splitlines() == [b"first", told, b"line 0", b"line 1", b"line 2"]


def test_a_line_of_a_request_is_written_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    root, stream = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    configure_logs("json", "info", stream)
    get_logger("often").info("request", status=200)
    log_often("often", logging.INFO, "request", status=200)
    log_often("often", logging.DEBUG, "request", status=200)
    root.handlers[0].flush()
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    for line in (first, second):
        age = datetime.now(UTC) - datetime.fromisoformat(line.pop("timestamp"))
        assert timedelta() <= age < timedelta(minutes=1)
    assert first == second
    assert first == {"event": "request", "status": 200, "level": "info", "logger": "often"}


def test_lines_of_requests_wait_for_each_other_but_are_written_soon() -> None:
    stream = io.StringIO()
    handler = QueueHandler(stream)
    handler.handle(record("first"))
    for number in range(3):
        later = record(str(number))
        setattr(later, LATER, True)
        handler.handle(later)
    wait_for(lambda: stream.getvalue() == "first\n0\n1\n2\n", "the lines are not written")


def test_what_a_closed_stream_loses_is_counted(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        handler = QueueHandler(stream)
    for number in range(2):
        handler.handle(record("lost"))
        handler.flush()
        assert handler.dropped == number + 1


def test_a_service_whose_log_nobody_reads_answers_and_ends(
    full_pipe: tuple[int, int], port: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings = {
        "CHECKPOINT": str(tiny_checkpoint),
        "DATA_DIR": str(tmp_path / "data"),
        "PORT": str(port),
        "RUNTIME": "torch",
        "DEVICE": "cpu",
        "LOG_LEVEL": "debug",
        "DECODE_PROCESSES": "1",
    }
    service = subprocess.Popen(
        [*CMT, "serve"],
        env={**os.environ, "OMP_NUM_THREADS": "1"} | {f"CMT_{n}": v for n, v in settings.items()},
        stdout=subprocess.DEVNULL,
        stderr=full_pipe[1],
    )
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            wait_for(lambda: is_up(http, "/readyz"), "it does not become ready", STARTING_SECONDS)
            assert http.get("/gallery").json()["total"] == 0
        service.send_signal(signal.SIGTERM)
        assert service.wait(ENDING_SECONDS) == 0
    finally:
        service.kill()
        service.wait()
