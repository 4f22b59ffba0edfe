"""Slow, stalled and vanished clients: each is cut off, and what it held is free again."""

from __future__ import annotations

import io
import json
import logging
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from PIL import Image

from service.auth.keys import KeyFile
from service.http.connection_timeouts import TimedProtocol
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

HEADERS, BODY = 1.0, 1.5  # seconds that the impatient service waits
NEVER = 3600.0  # what the patient one waits
STUCK = 60.0  # seconds until a test gives up
UPLOADS = ("/query", "/gallery", "/gallery/batch")

NOBODY = "0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10"  # an id of no item


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    return file.path, file.create("all", ["query", "enroll", "admin"])[1]


@pytest.fixture(scope="module")
def impatient(
    tiny_checkpoint: Path, token: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """A service that waits a second or two, and for few at once."""
    with ServiceProcess(
        tmp_path_factory.mktemp("data"),
        tiny_checkpoint,
        api_keys_file=token[0],
        header_timeout=HEADERS,
        body_timeout=BODY,
        max_pending=2,
        max_receiving=64,
    ) as service:
        yield service


class Patient(NamedTuple):
    """A service that waits for its clients for ever, and whose network, which takes one image at a
    time, can be held."""

    http: httpx.Client
    network: HeldNetwork

    def connect(self) -> socket.socket:
        url = self.http.base_url
        return socket.create_connection((url.host, url.port), timeout=STUCK)


@pytest.fixture(scope="module")
def patient(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patient]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        network = HeldNetwork(monkeypatch)
        waits = {"header_timeout": NEVER, "body_timeout": NEVER}
        with (
            serve(tmp_path_factory.mktemp("data"), max_batch=1, **waits) as url,
            httpx.Client(base_url=url, trust_env=False, timeout=STUCK) as http,
        ):
            yield Patient(http, network)


@pytest.fixture(scope="module")
def http(impatient: ServiceProcess, token: tuple[Path, str]) -> Iterator[httpx.Client]:
    with impatient.client(token[1]) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_left(impatient: ServiceProcess, http: httpx.Client) -> Iterator[None]:
    """After every test all places are free, queries are answered and the log is clean."""
    yield
    wait_until_idle(http)
    assert_no_defect(impatient)


@pytest.fixture
def key(token: tuple[Path, str]) -> bytes:
    """The header that carries the key."""
    return f"Authorization: Bearer {token[1]}\r\n".encode()


def connect(service: ServiceProcess) -> socket.socket:
    return socket.create_connection(service.address, timeout=STUCK)


def with_key(request: bytes, key: bytes) -> bytes:
    """A request with one header more."""
    line, rest = request.split(b"\r\n", 1)
    return line + b"\r\n" + key + rest


def assert_closed(connection: socket.socket, drip: bytes = b"") -> None:
    """The service ends a connection, even if `drip` is sent again and again meanwhile, without a
    pause as long as any that it allows."""
    connection.settimeout(0.1 if drip else STUCK)
    with suppress(ConnectionError):
        for _ in range(int(STUCK / 0.1) if drip else 1):
            try:
                while connection.recv(65536):
                    pass
                return
            except TimeoutError:
                connection.sendall(drip)
        pytest.fail("it is never closed")


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """The status and body of an answer."""
    response = HTTPResponse(connection)
    response.begin()
    return response.status, response.read()


class Read(NamedTuple):
    """How much of an answer's body was read, and the longest time between two blocks of it."""

    size: int
    longest: float


def reading(connection: socket.socket, size: int) -> Read:
    """Read an answer of so many bytes slowly."""
    response = HTTPResponse(connection)
    read, longest, before = 0, 0.0, time.monotonic()
    with suppress(ConnectionError, IncompleteRead):
        response.begin()
        while read < size and (block := response.read(200_000)):
            read += len(block)
            time.sleep(0.02)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
    return Read(read, max(longest, time.monotonic() - before))


def vanish(connection: socket.socket, *, abruptly: bool) -> None:
    """Close it, with a reset instead of an orderly end if `abruptly`."""
    if abruptly:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_a_connection_without_whole_headers_is_closed(
    impatient: ServiceProcess, http: httpx.Client, infrared: list[Path]
) -> None:
    beginnings = (b"", b"GET /liv", b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(impatient)) for _ in beginnings]
        for connection, sent in zip(slow, beginnings, strict=True):
            connection.sendall(sent)
        assert http.post("/query", files={"image": infrared[0].read_bytes()}).status_code == 200
        for connection in slow:
            assert_closed(connection)


def test_headers_byte_by_byte_win_no_time(impatient: ServiceProcess) -> None:
    with connect(impatient) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\nX: ")
        assert_closed(slow, drip=b"a")


def test_the_next_request_of_a_connection_must_come_in_time_too(
    impatient: ServiceProcess,
) -> None:
    with connect(impatient) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(slow)[0] == 200
        slow.sendall(b"GET /livez")
        assert_closed(slow)


def test_a_connection_may_be_used_again_after_a_pause(impatient: ServiceProcess) -> None:
    with connect(impatient) as kept:
        for pause in (0.0, HEADERS * 1.2):  # longer than headers may take
            time.sleep(pause)
            kept.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer(kept)[0] == 200


def test_a_body_that_stalls_is_answered_with_408(
    impatient: ServiceProcess, visible: list[Path], key: bytes
) -> None:
    requests = [multipart(path, [visible[0].read_bytes()])[:-100] for path in UPLOADS]
    for path in (f"PATCH /gallery/{NOBODY}", "POST /admin/reembed"):
        head = f"{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        requests.append(f"{head}Content-Length: 20\r\n\r\n{{".encode())
    with ExitStack() as stack:
        slow = []
        for request in requests:
            slow.append(stack.enter_context(connect(impatient)))
            slow[-1].sendall(with_key(request, key))
        for connection in slow:
            status, body = answer(connection)
            assert (status, json.loads(body)["code"]) == (408, "body_timeout")


def test_without_a_key_no_body_is_waited_for(impatient: ServiceProcess) -> None:
    paths = ("POST /gallery", "PATCH /gallery/x", "POST /admin/reembed", "GET /gallery")
    with ExitStack() as stack:
        slow = []
        for path in paths:
            head = f"{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.append(stack.enter_context(connect(impatient)))
            slow[-1].sendall(f"{head}Content-Length: 100000000000\r\n\r\n{{".encode())
            assert answer(slow[-1])[0] == 401
        # The rest of the body does not keep the connection open, however it comes.
        with ThreadPoolExecutor(len(slow)) as threads:
            list(threads.map(partial(assert_closed, drip=b"x"), slow))


@pytest.mark.parametrize(("path", "status"), [("GET /livez", 200), ("POST /gallery", 415)])
def test_nonsense_in_the_rest_of_a_body_that_was_answered_ends_the_connection(
    patient: Patient, path: str, status: int
) -> None:
    head = f"{path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with patient.connect() as mad:
        mad.sendall(head.encode())
        assert answer(mad)[0] == status
        mad.sendall(b"no chunk\r\n")
        assert_closed(mad)


def test_a_client_that_does_not_read_its_answer_is_cut_off(
    impatient: ServiceProcess, http: httpx.Client, key: bytes
) -> None:
    large = io.BytesIO()  # more than the buffers of a connection hold
    Image.linear_gradient("L").resize((2000, 2000)).convert("RGB").save(large, "BMP")
    path = f"/gallery/{http.post('/gallery', files={'image': large.getvalue()}).json()['id']}"
    request = with_key(f"GET {path}/image HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), key)
    for _ in range(9):  # one that reads all the time, if slowly, gets all of it
        with connect(impatient) as patient:
            patient.sendall(request)
            read = reading(patient, large.tell())
        if read.longest < BODY / 2:  # else this process stood still, and may have been cut off
            break
    assert read.size == large.tell()
    with connect(impatient) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(request)
        wait_for(lambda: impatient.holds(deaf), "it is not accepted")
        wait_for(lambda: not impatient.holds(deaf), "it is not cut off")
    assert http.delete(path).status_code == 204


def test_a_connection_that_was_ended_does_not_wait_for_its_client_to_read(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    connection_made = TimedProtocol.connection_made

    def noted(self: TimedProtocol, transport: Any) -> None:
        end = transport.get_extra_info("socket")
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made.append(self)
        connection_made(self, transport)

    monkeypatch.setattr(TimedProtocol, "connection_made", noted)
    with (
        serve(tmp_path, header_timeout=HEADERS, body_timeout=BODY, keep_alive_timeout=1) as url,
        socket.socket() as deaf,
    ):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((httpx.URL(url).host, httpx.URL(url).port))
        for _ in range(1000):
            deaf.sendall(b"GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(0.01)
            if made and (unread := made[0].transport.get_write_buffer_size()):
                break
        # So little that uvicorn does not stop writing, and looks no further.
        assert 0 < unread < 65536
        wait_for(lambda: made[0] not in made[0].connections, "it is not cut off")


@pytest.mark.parametrize("abruptly", [False, True])
@pytest.mark.parametrize("path", UPLOADS)
def test_a_client_that_vanishes_in_the_middle_of_its_body_leaves_its_place(
    impatient: ServiceProcess, http: httpx.Client, visible: list[Path], key: bytes, path: str,
    abruptly: bool,
) -> None:  # fmt: skip
    request = with_key(multipart(path, [visible[0].read_bytes()]), key)
    before = http.get("/gallery").json()["total"]
    connection = connect(impatient)
    connection.sendall(request[: len(request) // 2])
    vanish(connection, abruptly=abruptly)
    wait_until_idle(http)
    assert http.get("/gallery").json()["total"] == before


@pytest.mark.parametrize("abruptly", [False, True])
@pytest.mark.parametrize("path", UPLOADS)
def test_a_client_that_vanishes_before_its_answer_leaves_its_place_and_no_half_enrollment(
    patient: Patient, visible: list[Path], path: str, abruptly: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Its place is free, and its enrollment forgotten, while the network still works on it."""
    http, network = patient
    images = [file.read_bytes() for file in visible[:3]]
    images = images[:1] if path == "/gallery" else images
    wanted = 2 * len(images)

    def at_the_network() -> int:
        return sum(map(network.count, images)) + int(gauge(http, "cmt_embed_waiting"))

    before, seen = http.get("/gallery").json()["total"], at_the_network()
    with network.held():
        connections = [patient.connect() for _ in range(2)]
        for connection in connections:
            connection.sendall(multipart(path, images))
        wait_for(lambda: at_the_network() >= seen + wanted, "they do not reach the network")
        assert gauge(http, "cmt_uploads_pending") == 2
        for connection in connections:
            vanish(connection, abruptly=abruptly)
        wait_for(lambda: gauge(http, "cmt_uploads_pending") == 0, "places are not given back")
        reached = sum(map(network.count, images))
    wait_until_idle(http)
    # What waited is given up: nothing but the image that the network had already went through it.
    assert sum(map(network.count, images)) == reached <= seen + 1
    assert http.get("/gallery").json()["total"] == before
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_hundreds_of_vanished_clients_leave_nothing_behind(
    impatient: ServiceProcess, http: httpx.Client, visible: list[Path], key: bytes
) -> None:
    images = [visible[0].read_bytes()] * 2
    requests = [with_key(multipart(path, images), key) for path in UPLOADS]
    requests.append(with_key(b"GET /gallery?limit=1000 HTTP/1.1\r\nHost: x\r\n\r\n", key))
    wait_until_idle(http)
    before, children = impatient.descriptors(), impatient.children()
    enrolled = http.get("/gallery").json()["total"]
    for number in range(300):
        request = requests[number % len(requests)]
        part = (1, 0.3, 0.9)[number % 3]
        connection = connect(impatient)
        connection.sendall(request[: int(len(request) * part)])
        vanish(connection, abruptly=number % 2 == 0)
    wait_until_idle(http)
    # The pool of the database may have grown by a few files.
    wait_for(lambda: impatient.descriptors() < before + 30, "connections stay open")
    assert impatient.children() == children
    # A batch that was done before its client had vanished is there, and never one half of it.
    assert (http.get("/gallery").json()["total"] - enrolled) % 2 == 0
    assert http.post("/query", files={"image": images[0]}).status_code == 200


def test_many_slow_bodies_do_not_keep_a_query_from_being_answered(
    patient: Patient, visible: list[Path]
) -> None:
    image = visible[0].read_bytes()
    receiving = "cmt_uploads_receiving"
    with ExitStack() as stack:
        slow = [stack.enter_context(patient.connect()) for _ in range(50)]
        for connection in slow:
            connection.sendall(multipart("/gallery", [image])[:-100])
        wait_for(lambda: gauge(patient.http, receiving) == 50, "they are not received")
        assert patient.http.post("/query", files={"image": image}).status_code == 200
        assert gauge(patient.http, receiving) == 50  # they are still there
    wait_until_idle(patient.http)


def test_many_slow_bodies_are_all_answered_with_408(
    impatient: ServiceProcess, visible: list[Path], key: bytes
) -> None:
    request = with_key(multipart("/gallery", [visible[0].read_bytes()]), key)
    with ExitStack() as stack:
        slow = []
        for _ in range(50):
            slow.append(stack.enter_context(connect(impatient)))
            slow[-1].sendall(request[:-100])
        assert {answer(connection)[0] for connection in slow} == {408}
