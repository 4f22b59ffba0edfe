"""An orderly end: what is in flight finishes, what comes is refused, nothing is left."""

from __future__ import annotations

import signal
import socket
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.service.processes import (
    ServiceProcess,
    assert_no_defect,
    gauge,
    multipart,
    wait_for,
)

LINGER = 1.5
TIMEOUT = 20


@dataclass
class Call:
    """One enrollment that was tried. status: None where there was no answer."""

    began: float
    ended: float
    status: int | None = None
    item: str = ""


class Caller(threading.Thread):
    """Enrolls one crop after the other until there is nobody to enroll it."""

    def __init__(self, url: str, image: bytes) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._url, self._image = url, image

    def run(self) -> None:
        with httpx.Client(base_url=self._url, trust_env=False, timeout=60) as http:
            while not self.calls or self.calls[-1].status is not None:
                began = time.monotonic()
                try:
                    answer = http.post("/gallery", files={"image": self._image})
                except httpx.TransportError:
                    self.calls.append(Call(began, time.monotonic()))
                    return
                item = answer.json()["id"] if answer.status_code == 201 else ""
                self.calls.append(Call(began, time.monotonic(), answer.status_code, item))
                if answer.status_code == 503:
                    assert answer.json()["code"] == "shutting_down"
                    assert int(answer.headers["retry-after"]) > 0
                    time.sleep(0.05)


def stalled(service: ServiceProcess, http: httpx.Client, image: bytes) -> socket.socket:
    """An upload that is in flight and does not go on."""
    connection = socket.create_connection(service.address, timeout=60)
    connection.sendall(multipart("/gallery", [image])[:-100])
    wait_for(lambda: gauge(http, "cmt_uploads_receiving") == 1, "it is not received")
    return connection


def is_closing(http: httpx.Client) -> bool:
    answer = http.get("/readyz")
    return answer.status_code == 503 and answer.json()["code"] == "shutting_down"


def assert_gone(processes: list[int]) -> None:
    """The processes have ended."""
    assert processes
    wait_for(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes),
        "processes that decode are left",
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_under_load_what_is_in_flight_finishes_and_what_comes_is_refused(
    number: signal.Signals, tiny_checkpoint: Path, tmp_path: Path, visible: list[Path]
) -> None:
    service = ServiceProcess(
        tmp_path,
        tiny_checkpoint,
        shutdown_timeout=TIMEOUT,
        shutdown_linger=LINGER,
        batch_wait=0.3,  # so that there is always something in flight
        decode_processes=2,
    )
    image = visible[0].read_bytes()
    with service, service.client() as http:
        children = service.children()
        callers = [Caller(service.url, image) for _ in range(6)]
        for caller in callers:
            caller.start()
        wait_for(lambda: sum(len(c.calls) for c in callers) > 12, "nothing is enrolled", 60)
        signalled = time.monotonic()
        service.send(number)
        wait_for(lambda: is_closing(http), "it does not say that it closes")
        assert http.get("/livez").status_code == 200
        for refused in (http.get("/gallery"), http.post("/query", files={"image": image})):
            assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
            assert int(refused.headers["retry-after"]) > 0
        assert service.ended() == 0
        assert time.monotonic() - signalled < TIMEOUT
        for caller in callers:
            caller.join(60)
    calls = [call for caller in callers for call in caller.calls]
    assert {call.status for call in calls} == {201, 503, None}
    # Nobody met a closed door before the time to linger was over, and the work was finished.
    assert all(c.began > signalled + 0.9 * LINGER for c in calls if c.status is None)
    assert any(c.began < signalled < c.ended and c.status == 201 for c in calls)
    assert_no_defect(service)
    assert_gone(children)
    acknowledged = {call.item for call in calls if call.status == 201}
    with ServiceProcess(tmp_path, tiny_checkpoint) as again, again.client() as http:
        items = http.get("/gallery", params={"limit": 1000}).json()["items"]
    assert len(items) == len(acknowledged)
    assert {item["id"] for item in items} == acknowledged


def test_a_request_that_takes_too_long_does_not_hold_the_end(
    tiny_checkpoint: Path, tmp_path: Path, visible: list[Path]
) -> None:
    service = ServiceProcess(tmp_path, tiny_checkpoint, shutdown_timeout=1, shutdown_linger=0)
    with service, service.client() as http:
        children = service.children()
        with closing(stalled(service, http, visible[0].read_bytes())):
            service.send(signal.SIGTERM)
            assert service.ended(15) == 0
    assert "Traceback" not in service.text()
    assert not [one for one in service.log() if "exception" in one]
    assert_gone(children)


def test_a_second_ctrl_c_ends_it_at_once(
    tiny_checkpoint: Path, tmp_path: Path, visible: list[Path]
) -> None:
    service = ServiceProcess(tmp_path, tiny_checkpoint, shutdown_timeout=300)
    with service, service.client() as http:
        children = service.children()
        with closing(stalled(service, http, visible[0].read_bytes())):
            service.send(signal.SIGINT)
            wait_for(lambda: is_closing(http), "it does not say that it closes")
            service.send(signal.SIGINT)
            service.ended(15)
    assert "Traceback" not in service.text()
    assert_gone(children)
