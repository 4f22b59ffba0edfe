"""More than the service can take: refused at once, while what was accepted is done as ever."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.auth.keys import KeyFile
from service.client import Client, ServiceProblem
from service.http.admission import Admission
from tests.service.conftest import Serve
from tests.service.held_network import HeldNetwork
from tests.service.processes import (
    ServiceProcess,
    assert_no_defect,
    gauge,
    multipart,
    wait_for,
    wait_until_idle,
)

PLACES = 2
CLIENTS = 10 * PLACES
EACH = 2  # uploads of a client that are accepted
IMPATIENCE = 0.2  # seconds that a refused client waits here: a fifth of what it is told
BATCH_WAIT = 0.05  # an upload takes this long at least: places run out before the machine does


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> HeldNetwork:
    return HeldNetwork(monkeypatch)


def assert_overloaded(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["code"]) == (429, "overloaded")
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["instance"] == answer.request.url.path
    assert {"x-request-id", "content-security-policy", "cache-control"} <= answer.headers.keys()


def upload(http: httpx.Client, number: int, images: Sequence[bytes]) -> httpx.Response:
    """A query or, every second time, an enrollment."""
    path = "/query" if number % 2 else "/gallery"
    return http.post(path, files={"image": images[number % len(images)]})


def test_who_finds_no_place_is_refused_while_the_others_are_worked_on(
    network: HeldNetwork, serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    """Nothing of the accepted is done before all the others have their answer."""
    images = [file.read_bytes() for file in visible]
    with (
        serve(tmp_path, max_pending=PLACES) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=120) as http,
        ThreadPoolExecutor(PLACES) as threads,
    ):
        with network.held():
            accepted = [threads.submit(upload, http, number, images) for number in range(PLACES)]
            wait_for(lambda: gauge(http, "cmt_uploads_pending") == PLACES, "they are not let in")
            for number in range(CLIENTS):
                assert_overloaded(upload(http, number, images))
            assert gauge(http, "cmt_uploads_pending") == PLACES
            for route in ("/query", "/gallery"):
                labels = f'method="POST",route="{route}",status="429"'
                refused = gauge(http, f"cmt_http_requests_total{{{labels}}}")
                assert refused == CLIENTS / 2
            assert http.get("/gallery").json()["total"] == 0
            assert not any(one.done() for one in accepted)
        answers = [one.result() for one in accepted]
        assert [answer.status_code for answer in answers] == [201, 200] * (PLACES // 2)
        enrolled = {answer.json()["id"] for answer in answers if answer.status_code == 201}
        assert {item["id"] for item in items(http)} == enrolled
        wait_until_idle(http)
        assert upload(http, 0, images).status_code == 201


def test_what_takes_longer_than_it_may_is_refused_at_once_or_given_up(
    network: HeldNetwork, serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    image = visible[0].read_bytes()

    def send(path: str, seconds: str) -> httpx.Response:
        headers = {"X-Request-Timeout": seconds}
        return http.post(path, files={"image": image}, headers=headers)

    with (
        serve(tmp_path) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=120) as http,
        ThreadPoolExecutor(1) as threads,
    ):
        with network.held():
            for path in ("/query", "/gallery", "/gallery/batch"):
                late = send(path, "1.5")
                assert (late.status_code, late.json()["code"]) == (504, "request_timed_out")
                assert "1.5 seconds" in late.json()["detail"]
            with (
                Client(url, request_timeout=1) as client,
                pytest.raises(ServiceProblem, match="1 seconds") as raised,
            ):
                client.query(image)
            assert raised.value.code == "request_timed_out"
            waiting = threads.submit(upload, http, 1, [image])
            wait_for(lambda: gauge(http, "cmt_uploads_pending") == 1, "it is not let in")
            refused = send("/query", "0.1")  # the ones before took more than a second each
            assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            assert not waiting.done()
        assert waiting.result().status_code == 200
        wait_until_idle(http)
        assert send("/gallery", "60").status_code == 201
        for text in ("0", "-1", "", "nan", "inf", "1e400", "null", "soon", "86401"):
            bad = send("/query", text)
            assert (bad.status_code, bad.json()["code"]) == (422, "parameters_invalid"), text
    with (
        serve(tmp_path, request_timeout=1) as url,
        network.held(),
        httpx.Client(base_url=url, trust_env=False, timeout=120) as http,
    ):
        assert http.post("/query", files={"image": image}).status_code == 504


def test_beyond_a_burst_refusals_are_given_one_by_one() -> None:
    admission = Admission(receiving=1, working=1, bytes=1)
    waits = [admission.before_refusal(1000.0) for _ in range(1000)]
    at_once = waits.count(0)
    assert waits[:at_once] == [0] * at_once  # a few are refused at once
    assert 20 < at_once < 500
    longest = max(waits)
    queued = waits[at_once : waits.index(longest)]
    apart = queued[1] - queued[0]
    assert queued == pytest.approx([apart * (n + 1) for n in range(len(queued))])
    assert waits[-1] == longest <= 3  # nobody waits for ever to be told to go away
    # Who comes later finds those before him gone: one place in the line for each `apart`.
    assert admission.before_refusal(1000 + apart) == pytest.approx(longest)
    assert admission.before_refusal(1000 + 2 * longest) == 0


class Storm:
    """Clients that come together, each with one upload at a time, until each was accepted so often.

    statuses: of all answers. enrolled: ids. pending, memory: the most of it that was seen.
    """

    def __init__(self, service: ServiceProcess, images: Sequence[bytes], clients: int) -> None:
        self.statuses: Counter[int] = Counter()
        self.enrolled: list[str] = []
        self.pending = self.memory = 0.0
        self._service, self._images = service, images
        self._together, self._lock = threading.Barrier(clients), threading.Lock()
        with ThreadPoolExecutor(clients) as threads, service.client() as http:
            running = [threads.submit(self._client, number) for number in range(clients)]
            while not all(one.done() for one in running):
                self.pending = max(self.pending, gauge(http, "cmt_uploads_pending"))
                self.memory = max(self.memory, sum(service.memory().values()))
                time.sleep(0.05)
            for one in running:
                one.result()

    def _client(self, number: int) -> None:
        accepted = 0
        with self._service.client() as http:
            self._together.wait()
            while accepted < EACH:
                answer = upload(http, number, self._images)
                accepted += answer.is_success
                with self._lock:
                    self.statuses[answer.status_code] += 1
                    if answer.status_code == 201:
                        self.enrolled.append(answer.json()["id"])
                if not answer.is_success:
                    assert_overloaded(answer)
                    time.sleep(IMPATIENCE)


def test_ten_times_the_clients_all_get_through_and_nothing_is_lost(
    tiny_checkpoint: Path, tmp_path: Path, visible: list[Path]
) -> None:
    images = [file.read_bytes() for file in visible]
    with (
        ServiceProcess(
            tmp_path, tiny_checkpoint, max_pending=PLACES, batch_wait=BATCH_WAIT
        ) as service,
        service.client() as http,
    ):
        few, many = Storm(service, images, PLACES), Storm(service, images, CLIENTS)
        assert few.statuses == {200: PLACES * EACH // 2, 201: PLACES * EACH // 2}
        assert many.statuses.keys() <= {200, 201, 429}
        assert many.statuses[200] == many.statuses[201] == CLIENTS * EACH // 2
        assert many.pending <= PLACES
        assert many.memory < few.memory + 200e6
        wait_until_idle(http)
        # What was acknowledged is there, and nothing of what was refused.
        assert {item["id"] for item in items(http)} == {*few.enrolled, *many.enrolled}
        answer = upload(http, 1, images)
        assert answer.json()["searched"] == len(few.enrolled) + len(many.enrolled)
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
    network: HeldNetwork, serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    def enroll(url: str) -> str:
        with Client(url, retries=60) as client:
            return client.enroll(visible[0]).id

    with (
        serve(tmp_path, max_pending=2) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
        ThreadPoolExecutor(8) as threads,
    ):
        with network.held():
            enrolled = [threads.submit(enroll, url) for _ in range(8)]
            refusals = 'cmt_rejections_total{code="overloaded"}'
            wait_for(lambda: refusals in http.get("/metrics").text, "nobody is refused")
        acknowledged = {one.result() for one in enrolled}
        assert {item["id"] for item in items(http)} == acknowledged


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


def test_more_bytes_than_may_be_held_are_refused(
    serve: Serve, tmp_path: Path, visible: list[Path]
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
    serve: Serve, tmp_path: Path, visible: list[Path]
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


def test_a_key_has_the_rate_of_the_service_or_one_of_its_own(serve: Serve, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    rates = {"ordinary": None, "another": None, "frugal": "2/hour", "busy": "1000/second"}
    tokens = {name: file.create(name, ["query"], rate)[1] for name, rate in rates.items()}
    with serve(tmp_path / "data", api_keys_file=file.path, rate_limit="5/hour") as url:
        allowed = {}
        for name, token in tokens.items():
            header = {"Authorization": f"Bearer {token}"}
            with httpx.Client(base_url=url, trust_env=False, timeout=60, headers=header) as http:
                allowed[name] = calls_until_refused(http)
                assert http.get("/livez").status_code == 200  # probes count for nobody
        assert allowed == {"ordinary": 5, "another": 5, "frugal": 2, "busy": 100}


@pytest.mark.parametrize("path", ["/query", "/gallery"])
def test_an_upload_over_the_rate_is_refused_before_its_body_is_read(
    serve: Serve, tmp_path: Path, path: str
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


def test_after_the_time_it_was_told_a_key_may_come_again(serve: Serve, tmp_path: Path) -> None:
    with (
        serve(tmp_path, rate_limit="3/second") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
        Client(url) as patient,
    ):
        assert calls_until_refused(http) >= 3
        assert [patient.list().total for _ in range(7)] == [0] * 7  # it waits as it is told
