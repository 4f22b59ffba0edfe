"""An orderly end: what is in flight finishes, what comes is refused, nothing is left."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from socket import create_connection, create_server, socket

import httpx
import pytest

from service.client import Client
from tests.service.conftest import Serve
from tests.service.processes import (
    ServiceProcess,
    assert_no_defect,
    gauge,
    multipart,
    runs,
    wait_for,
)

NEVER = 3600  # seconds
# A GPU that is lost once a file is there, as PyTorch says it.
LOSING = """
import pathlib, time, torch
from service.embedding.embedder import Embedder
from service.embedding.torch_runtime import TorchBackend

def losing(compute):
    def computed(*arguments):
        if pathlib.Path({flag!r}).exists():
            raise torch.AcceleratorError(
                "CUDA error: an illegal memory access was encountered\\n"
                "Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/ for more"
            )
        return compute(*arguments)
    return computed
"""
LOST = "the GPU is lost for this process, which ends to be started again"


class Caller(threading.Thread):
    """Enrolls one crop after the other until there is nobody to enroll it."""

    def __init__(self, service: ServiceProcess, image: bytes) -> None:
        super().__init__()
        self.answers: list[httpx.Response] = []
        self._service, self._image = service, image

    def run(self) -> None:
        with self._service.client() as http:
            try:
                while True:
                    self.answers.append(http.post("/gallery", files={"image": self._image}))
                    if not self.answers[-1].is_success:
                        time.sleep(0.05)
            except httpx.TransportError:
                return


@contextmanager
def stalled(service: ServiceProcess, http: httpx.Client, request: bytes) -> Iterator[socket]:
    """A connection with an upload that is in flight, all but its last byte."""
    before = gauge(http, "cmt_uploads_receiving")
    with create_connection(service.address, timeout=60) as connection:
        connection.sendall(request[:-1])
        wait_for(lambda: gauge(http, "cmt_uploads_receiving") > before, "it is not received")
        yield connection


def assert_refused(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["code"]) == (503, "shutting_down")
    assert int(answer.headers["retry-after"]) > 0


def is_closing(http: httpx.Client) -> bool:
    answer = http.get("/readyz")
    return answer.status_code == 503 and answer.json()["code"] == "shutting_down"


def assert_gone(processes: list[int]) -> None:
    """The processes have ended."""
    assert processes
    wait_for(lambda: not any(map(runs, processes)), "processes that decode are left")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_under_load_what_is_in_flight_finishes_and_what_comes_is_refused(
    number: signal.Signals, tiny_checkpoint: Path, tmp_path: Path, visible: list[Path], serve: Serve
) -> None:
    service = ServiceProcess(
        tmp_path, tiny_checkpoint, shutdown_timeout=NEVER, shutdown_linger=1, decode_processes=2
    )
    image = visible[0].read_bytes()
    request = multipart("/gallery", [image])
    with service, service.client() as http:
        children = service.children()
        callers = [Caller(service, image) for _ in range(6)]
        for caller in callers:
            caller.start()
        wait_for(lambda: all(len(one.answers) > 2 for one in callers), "nothing is enrolled")
        with stalled(service, http, request) as in_flight:
            service.send(number)
            wait_for(lambda: is_closing(http), "it does not say that it closes")
            assert http.get("/livez").status_code == 200
            assert_refused(http.get("/gallery"))
            assert_refused(http.post("/query", files={"image": image}))
            # As long as something is in flight, nobody meets a closed door.
            wait_for(lambda: not any(c.answers[-1].is_success for c in callers), "it lets them in")
            in_flight.sendall(request[-1:])
            answer = HTTPResponse(in_flight)
            answer.begin()
            assert answer.status == 201
        assert service.ended() == 0
        for caller in callers:
            caller.join(60)
    acknowledged = 1
    for caller in callers:
        enrolled = [*itertools.takewhile(lambda one: one.status_code == 201, caller.answers)]
        for refused in caller.answers[len(enrolled) :]:
            assert_refused(refused)
        acknowledged += len(enrolled)
    assert_no_defect(service)
    assert_gone(children)
    with serve(tmp_path) as url, Client(url) as client:
        pages = [client.list(limit=1000)]  # more than one where the machine is quick
        while pages[-1].next_cursor is not None:
            pages.append(client.list(limit=1000, cursor=pages[-1].next_cursor))
    items = [item for page in pages for item in page.items]
    assert len(items) == acknowledged
    known = {one.json()["id"] for c in callers for one in c.answers if one.is_success}
    assert known < {item.id for item in items}


def test_with_nothing_in_flight_it_lingers_and_ends_at_a_second_ctrl_c(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    service = ServiceProcess(
        tmp_path, tiny_checkpoint, shutdown_timeout=NEVER, shutdown_linger=NEVER
    )
    with service, service.client() as http:
        service.send(signal.SIGINT)
        wait_for(lambda: is_closing(http), "it does not say that it closes")
        time.sleep(0.5)  # it looks whether it may end more often than that
        assert_refused(http.get("/gallery"))
        service.send(signal.SIGINT)
        service.ended()
    assert "Traceback" not in service.text()


def test_a_request_that_takes_too_long_does_not_hold_the_end(
    tiny_checkpoint: Path, tmp_path: Path, visible: list[Path]
) -> None:
    service = ServiceProcess(
        tmp_path, tiny_checkpoint, shutdown_timeout=1, shutdown_linger=0, body_timeout=NEVER
    )
    with service, service.client() as http:
        children = service.children()
        with stalled(service, http, multipart("/gallery", [visible[0].read_bytes()])):
            service.send(signal.SIGHUP)  # as of a terminal that closes: an orderly end too
            assert service.ended() == 0
    assert "Traceback" not in service.text()
    assert not [one for one in service.log() if "exception" in one]
    assert_gone(children)


def test_a_second_ctrl_c_ends_it_at_once(
    tiny_checkpoint: Path, tmp_path: Path, visible: list[Path]
) -> None:
    service = ServiceProcess(tmp_path, tiny_checkpoint, shutdown_timeout=NEVER, body_timeout=NEVER)
    with service, service.client() as http:
        children = service.children()
        with stalled(service, http, multipart("/gallery", [visible[0].read_bytes()])):
            service.send(signal.SIGINT)
            wait_for(lambda: is_closing(http), "it does not say that it closes")
            service.send(signal.SIGINT)
            service.ended()
    assert "Traceback" not in service.text()
    assert_gone(children)


def test_a_second_ctrl_c_ends_it_while_it_loads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with create_server(("127.0.0.1", 0)) as database:  # which never answers
        port = database.getsockname()[1]
        database.settimeout(120)
        service = ServiceProcess(
            tmp_path,
            tiny_checkpoint,
            database_url=f"postgresql+psycopg://u:p@127.0.0.1:{port}/d?connect_timeout=600",
        )
        try:
            waiting, _ = database.accept()
            with waiting:
                service.send(signal.SIGINT)
                wait_for(lambda: "a second Ctrl-C" in service.text(), "it says nothing")
                assert service.process.poll() is None
                service.send(signal.SIGINT)
                assert service.ended() == 130
        finally:
            service.kill()
    assert_no_defect(service)


@pytest.mark.parametrize("where", ["the network", "a search"])
def test_a_lost_gpu_ends_it_with_a_failure_and_nothing_is_lost(
    where: str, tiny_checkpoint: Path, tmp_path: Path, image: bytes
) -> None:
    flag, data = tmp_path / "lost", tmp_path / "data"
    of_network = "TorchBackend.__call__ = losing(TorchBackend.__call__)"
    of_search = "Embedder.modulation = losing(Embedder.modulation)"
    lost_there = of_network if where == "the network" else of_search
    if several := where == "the network":  # are asked before it ends, which it does not wait for
        lost_there += "\nimport service.server"
        lost_there += "\nservice.server._LOST_SECONDS = service.server._END_SECONDS = 60.0"
    service = ServiceProcess(
        data,
        tiny_checkpoint,
        before=LOSING.format(flag=str(flag)) + lost_there,
        shutdown_timeout=NEVER,
        body_timeout=NEVER,
    )
    files = {"image": image}
    with service, service.client() as http:
        children = service.children()
        enrolled = [http.post("/gallery", files=files).json()["id"] for _ in range(3)]
        assert http.post("/query", files=files).status_code == 200
        with stalled(service, http, multipart("/gallery", [image])) as never_ending:
            flag.touch()
            answer = http.post("/query", files=files)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert "GPU is lost" in answer.json()["detail"]
            if several:
                ready = http.get("/readyz")
                assert ready.status_code == 503
                assert "GPU is lost" in ready.json()["detail"]
                assert_refused(http.get("/gallery"))
                assert http.get("/livez").status_code == 200
                never_ending.close()
            assert service.ended() == 1
    assert service.lines[-1].startswith(f"Error: {LOST} (CUDA error: an illegal memory access")
    critical = [one for one in service.lines if '"critical"' in one]
    assert len(critical) == 1
    assert LOST in critical[0]
    assert "Traceback" not in service.text()
    assert_gone(children)
    flag.unlink()
    with ServiceProcess(data, tiny_checkpoint) as again, again.client() as http:
        assert {item["id"] for item in http.get("/gallery").json()["items"]} == {*enrolled}
        assert http.post("/query", files=files).json()["results"]


def test_a_gpu_that_background_work_finds_lost_ends_it_though_a_thread_hangs(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    flag = tmp_path / "lost"
    hanging = """
from service.gallery import Gallery
from service.pipeline import pipeline
import service.server
pipeline._RETAIN_EVERY = 0.2
Gallery.retain = losing(Gallery.retain)
pipeline.Pipeline.close = lambda self: time.sleep(3600)
service.server._END_SECONDS = 2.0
"""
    service = ServiceProcess(
        tmp_path / "data", tiny_checkpoint, before=LOSING.format(flag=str(flag)) + hanging
    )
    with service, service.client() as http:
        children = service.children()
        assert http.get("/readyz").status_code == 200
        flag.touch()
        assert service.ended() == 1
    assert service.lines[-1].startswith(f"Error: {LOST}")
    assert "Traceback" not in service.text()
    assert_gone(children)
