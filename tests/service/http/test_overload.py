"""More than the service can take: refused at once, while what was accepted is done as ever."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from service.auth.keys import KeyFile
from service.client import Client
from tests.service.processes import (
    ServiceProcess,
    assert_no_defect,
    gauge,
    multipart,
    wait_for,
    wait_until_idle,
)

PLACES = 4
SECONDS = 4.0
IMPATIENCE = 0.2  # what a refused client waits here: a fifth of what it is told to
BATCH_WAIT = 0.05  # an upload takes this long at least: places run out before the machine does


@dataclass
class Load:
    """What a number of clients came to. latencies: seconds, of accepted and of refused calls."""

    statuses: Counter[int] = field(default_factory=Counter)
    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    seconds: float = 0.0
    most_memory: int = 0

    @property
    def rate(self) -> float:
        """Accepted requests in a second."""
        return len(self.accepted) / self.seconds


def load(service: ServiceProcess, clients: int, images: list[bytes]) -> Load:
    """Queries and enrollments by so many clients, each with one request at a time."""
    total, lock = Load(), threading.Lock()
    ending = time.monotonic() + SECONDS

    def client(number: int) -> None:
        with service.client() as http:
            while time.monotonic() < ending:
                path = "/query" if number % 2 else "/gallery"
                began = time.monotonic()
                answer = http.post(path, files={"image": images[number % len(images)]})
                took = time.monotonic() - began
                with lock:
                    total.statuses[answer.status_code] += 1
                    (total.accepted if answer.is_success else total.refused).append(took)
                    if answer.status_code == 201:
                        total.items.append(answer.json()["id"])
                if answer.status_code == 429:
                    assert answer.json()["code"] == "overloaded"
                    assert answer.headers["retry-after"] == "1"
                    time.sleep(IMPATIENCE)

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(client, number) for number in range(clients)]
        while not all(one.done() for one in running):
            total.most_memory = max(total.most_memory, sum(service.memory().values()))
            time.sleep(0.1)
        for one in running:
            one.result()
    total.seconds = time.monotonic() - began
    return total


def test_ten_times_the_clients_cost_the_accepted_ones_little(
    tiny_checkpoint: Path, tmp_path: Path, visible: list[Path]
) -> None:
    images = [file.read_bytes() for file in visible]
    with (
        ServiceProcess(
            tmp_path, tiny_checkpoint, max_pending=PLACES, batch_wait=BATCH_WAIT
        ) as service,
        service.client() as http,
    ):
        load(service, PLACES, images)  # warm
        saturated = load(service, PLACES, images)
        overloaded = load(service, 10 * PLACES, images)
        print(
            f"\nsaturated: {saturated.rate:.0f}/s with {PLACES} clients; overloaded: "
            f"{overloaded.rate:.0f}/s with {10 * PLACES} ({overloaded.rate / saturated.rate:.0%}), "
            f"{overloaded.statuses[429]} refused in {1000 * median(overloaded.refused):.0f} ms, at "
            f"most {1000 * max(overloaded.refused):.0f} ms; memory at most "
            f"{saturated.most_memory / 1e6:.0f} and {overloaded.most_memory / 1e6:.0f} MB"
        )
        assert set(saturated.statuses) == {200, 201}
        assert set(overloaded.statuses) == {200, 201, 429}
        assert overloaded.statuses[429] > 50
        assert overloaded.rate > 0.5 * saturated.rate
        assert median(overloaded.refused) < 0.5 and max(overloaded.refused) < 5
        assert max(overloaded.accepted) < 10
        assert overloaded.most_memory < saturated.most_memory + 200e6
        wait_until_idle(http)
        # What was acknowledged is there, and nothing of what was refused.
        listed = {item["id"] for item in items(http)}
        assert {*saturated.items, *overloaded.items} <= listed
        with service.client() as other:
            answer = other.post("/query", files={"image": images[0]})
        assert answer.json()["searched"] == len(listed)
    assert_no_defect(service)


def items(http: httpx.Client) -> list[dict[str, Any]]:
    """All items, page by page; no id twice."""
    found: list[dict[str, Any]] = []
    page = {"limit": "1000"}
    while True:
        answer = http.get("/gallery", params=page).json()
        found += answer["items"]
        if answer["next_cursor"] is None:
            break
        page["cursor"] = answer["next_cursor"]
    assert len({item["id"] for item in found}) == len(found) == answer["total"]
    return found


def test_a_client_that_tries_again_gets_through(
    serve: Any, tmp_path: Path, visible: list[Path]
) -> None:
    together = threading.Barrier(8)

    def enroll(url: str) -> str:
        with Client(url, retries=30) as client:
            together.wait()
            return client.enroll(visible[0]).id

    with serve(tmp_path, max_pending=2, batch_wait=0.3) as url:
        with ThreadPoolExecutor(8) as threads:
            enrolled = list(threads.map(enroll, [url] * 8))
        with httpx.Client(base_url=url, trust_env=False) as http:
            assert {item["id"] for item in items(http)} == set(enrolled)
            assert 'cmt_rejections_total{code="overloaded"}' in http.get("/metrics").text


def slow_uploads(
    stack: ExitStack, http: httpx.Client, count: int, image: bytes
) -> list[socket.socket]:
    """Uploads of which all but the end has come."""
    address = (http.base_url.host, http.base_url.port)
    connections = []
    for _ in range(count):
        connection = stack.enter_context(closing(socket.create_connection(address, timeout=60)))
        connection.sendall(multipart("/gallery", [image])[:-50])
        connections.append(connection)
    wait_for(lambda: gauge(http, "cmt_uploads_receiving") == count, "they are not received")
    return connections


def assert_overloaded(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["code"]) == (429, "overloaded")
    assert answer.headers["retry-after"] == "1"


def test_more_bytes_than_may_be_held_are_refused(
    serve: Any, tmp_path: Path, visible: list[Path]
) -> None:
    image = visible[0].read_bytes()
    limit = 250_000
    limits = {f"max_{what}_bytes": limit for what in ("image", "batch", "pending")}
    with (
        serve(tmp_path, **limits) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
        ExitStack() as stack,
    ):
        [slow] = slow_uploads(stack, http, 1, bytes(limit - 20_000))
        assert http.post("/query", files={"image": image}).status_code == 200  # it fits beside
        large = {"image": image + bytes(40_000)}  # this one does not
        wait_for(lambda: http.post("/query", files=large).status_code == 429, "it is let in")
        assert_overloaded(http.post("/query", files=large))
        slow.close()
        wait_until_idle(http)
        assert http.post("/query", files=large).status_code != 429


def test_more_uploads_on_their_way_than_may_be_are_refused(
    serve: Any, tmp_path: Path, visible: list[Path]
) -> None:
    image = visible[0].read_bytes()
    with (
        serve(tmp_path, max_receiving=3) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
        ExitStack() as stack,
    ):
        slow = slow_uploads(stack, http, 3, image)
        assert_overloaded(http.post("/gallery", files={"image": image}))
        assert http.get("/gallery").status_code == 200  # only uploads wait in that line
        for connection in slow:
            connection.close()
        wait_until_idle(http)
        assert http.post("/gallery", files={"image": image}).status_code == 201


def calls_until_refused(http: httpx.Client) -> int:
    """How many calls get through; the one that does not says when to come again."""
    for count in range(100):
        answer = http.get("/gallery")
        if answer.status_code != 200:
            assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
            assert 1 <= int(answer.headers["retry-after"]) <= 3600
            return count
    return 100


def test_a_key_has_the_rate_of_the_service_or_one_of_its_own(serve: Any, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    rates = {"ordinary": None, "another": None, "frugal": "2/hour", "busy": "1000/second"}
    tokens = {name: file.create(name, ["query"], rate)[1] for name, rate in rates.items()}
    with serve(tmp_path / "data", api_keys_file=file.path, rate_limit="5/hour") as url:
        allowed = {}
        for name, token in tokens.items():
            header = {"Authorization": f"Bearer {token}"}
            with httpx.Client(base_url=url, trust_env=False, headers=header) as http:
                allowed[name] = calls_until_refused(http)
                assert http.get("/livez").status_code == 200  # probes count for nobody
        assert allowed == {"ordinary": 5, "another": 5, "frugal": 2, "busy": 100}


@pytest.mark.parametrize("path", ["/query", "/gallery"])
def test_an_upload_over_the_rate_is_refused_before_its_body_is_read(
    serve: Any, tmp_path: Path, path: str
) -> None:
    with (
        serve(tmp_path, rate_limit="1/hour") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        http.get("/gallery")  # without keys the address has the rate
        address = (http.base_url.host, http.base_url.port)
        with closing(socket.create_connection(address, timeout=60)) as connection:
            connection.sendall(multipart(path, [bytes(1000)])[:-500])
            assert connection.recv(12) == b"HTTP/1.1 429"


def test_after_the_time_it_was_told_a_key_may_come_again(serve: Any, tmp_path: Path) -> None:
    with (
        serve(tmp_path, rate_limit="3/second") as url,
        httpx.Client(base_url=url, trust_env=False) as http,
        Client(url) as patient,
    ):
        assert calls_until_refused(http) >= 3
        assert [patient.list().total for _ in range(7)] == [0] * 7  # it waits as it is told
