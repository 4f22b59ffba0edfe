"""Slow, stalled and vanished clients: each is cut off, and what it held is free again."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from service import server
from service.auth.keys import KeyFile
from tests.service.processes import (
    ServiceProcess,
    assert_no_defect,
    gauge,
    multipart,
    wait_for,
    wait_until_idle,
)

HEADERS, BODY = 1.0, 1.5  # seconds that the service here waits
LATE = 8.0  # seconds beyond, on a busy machine
BATCH_WAIT = 0.9  # so long an image waits for others, if any: time enough to vanish
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
        batch_wait=BATCH_WAIT,
    ) as service:
        yield service


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
    return socket.create_connection(service.address, timeout=LATE)


def with_key(request: bytes, key: bytes) -> bytes:
    """A request with one header more."""
    line, rest = request.split(b"\r\n", 1)
    return line + b"\r\n" + key + rest


def seconds_until_closed(connection: socket.socket, drip: bytes = b"") -> float:
    """How long the service keeps a connection open; `drip` is sent a byte at a time meanwhile."""
    began = time.monotonic()
    connection.settimeout(0.1 if drip else HEADERS + BODY + LATE)
    with suppress(ConnectionError):
        for byte in drip or b"\0":
            try:
                while connection.recv(65536):
                    pass
                break
            except TimeoutError:
                assert drip, "it is never closed"
                connection.sendall(bytes([byte]))
        else:
            pytest.fail("it is never closed")
    return time.monotonic() - began


def answer(connection: socket.socket, pause: float = 0.0) -> tuple[int, bytes]:
    """The status and body of an answer; `pause`: between one block that is read and the next."""
    response = HTTPResponse(connection)
    response.begin()
    body = b""
    while block := response.read(200_000):
        body += block
        time.sleep(pause)
    return response.status, body


def vanish(connection: socket.socket, *, abruptly: bool) -> None:
    """Close it, with a reset instead of an orderly end if `abruptly`."""
    if abruptly:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize(
    "sent", [b"", b"GET /liv", b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Long: "]
)
def test_a_connection_without_whole_headers_is_closed(
    impatient: ServiceProcess, http: httpx.Client, infrared: list[Path], sent: bytes
) -> None:
    with connect(impatient) as slow:
        slow.sendall(sent)
        assert http.post("/query", files={"image": infrared[0].read_bytes()}).status_code == 200
        assert seconds_until_closed(slow) < HEADERS + LATE


def test_headers_byte_by_byte_win_no_time(impatient: ServiceProcess) -> None:
    with connect(impatient) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\nX: ")
        took = seconds_until_closed(slow, drip=b"a" * 200)
    assert HEADERS / 2 < took < HEADERS + LATE


def test_the_next_request_of_a_connection_must_come_in_time_too(
    impatient: ServiceProcess,
) -> None:
    with connect(impatient) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(slow)[0] == 200
        slow.sendall(b"GET /livez")
        assert seconds_until_closed(slow) < HEADERS + LATE


def test_a_connection_may_be_used_again_after_a_pause(impatient: ServiceProcess) -> None:
    with connect(impatient) as kept:
        for _ in range(3):
            kept.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer(kept)[0] == 200
            time.sleep(HEADERS * 1.2)  # longer than headers may take, less than uvicorn keeps it


@pytest.mark.parametrize("path", UPLOADS)
def test_a_body_that_stalls_is_answered_with_408(
    impatient: ServiceProcess, http: httpx.Client, visible: list[Path], key: bytes, path: str
) -> None:
    request = with_key(multipart(path, [visible[0].read_bytes()]), key)
    with connect(impatient) as slow:
        slow.sendall(request[:-100])
        wait_for(lambda: gauge(http, "cmt_uploads_receiving") == 1, "it is not received")
        status, body = answer(slow)
    assert (status, json.loads(body)["code"]) == (408, "body_timeout")


@pytest.mark.parametrize("path", [f"PATCH /gallery/{NOBODY}", "POST /admin/reembed"])
def test_a_json_body_that_stalls_is_answered_with_408(
    impatient: ServiceProcess, key: bytes, path: str
) -> None:
    head = f"{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(impatient) as slow:
        slow.sendall(with_key(f"{head}Content-Length: 20\r\n\r\n{{".encode(), key))
        assert answer(slow)[0] == 408


@pytest.mark.parametrize(
    "path", ["POST /gallery", "PATCH /gallery/x", "POST /admin/reembed", "GET /gallery"]
)
def test_without_a_key_no_body_is_waited_for(impatient: ServiceProcess, path: str) -> None:
    head = f"{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(impatient) as slow:
        slow.sendall(f"{head}Content-Length: 100000000000\r\n\r\n{{".encode())
        assert answer(slow)[0] == 401
        took = seconds_until_closed(slow, drip=b"x" * 200)
    assert took < BODY + LATE  # the rest of the body does not keep the connection open


@pytest.mark.parametrize("path", ["GET /livez", "POST /gallery"])
def test_nonsense_in_the_rest_of_a_body_that_was_answered_ends_the_connection(
    impatient: ServiceProcess, path: str
) -> None:
    head = f"{path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(impatient) as mad:
        mad.sendall(head.encode())
        assert answer(mad)[0] in (200, 401)
        mad.sendall(b"no chunk\r\n")
        assert seconds_until_closed(mad) < BODY


def test_a_client_that_does_not_read_its_answer_is_cut_off(
    impatient: ServiceProcess, http: httpx.Client, key: bytes
) -> None:
    large = io.BytesIO()  # more than the buffers of a connection hold
    Image.new("RGB", (2000, 2000), (200, 30, 30)).save(large, "BMP")
    path = f"/gallery/{http.post('/gallery', files={'image': large.getvalue()}).json()['id']}"
    request = with_key(f"GET {path}/image HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), key)
    with connect(impatient) as patient:  # one that reads all the time, if slowly, gets all of it
        patient.sendall(request)
        assert len(answer(patient, pause=0.02)[1]) == large.tell()
    with connect(impatient) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(request)
        wait_for(lambda: impatient.holds(deaf), "it is not accepted")
        wait_for(lambda: not impatient.holds(deaf), "it is not cut off", 3 * BODY + LATE)
    assert http.delete(path).status_code == 204


def test_a_connection_that_was_ended_does_not_wait_for_its_client_to_read(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    patient_for = server.patient_for

    def noted(headers: float, body: float) -> type[Any]:
        class Noted(patient_for(headers, body)):  # type: ignore[misc]
            def connection_made(self, transport: Any) -> None:
                end = transport.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                made.append(self)
                super().connection_made(transport)

        return Noted

    monkeypatch.setattr(server, "patient_for", noted)
    with (
        serve(tmp_path, header_timeout=HEADERS, body_timeout=BODY) as url,
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
        wait_for(lambda: made[0] not in made[0].connections, "it is not cut off", 30)


@pytest.mark.parametrize("abruptly", [False, True])
@pytest.mark.parametrize("path", UPLOADS)
def test_a_client_that_vanishes_leaves_its_place_and_no_half_enrollment(
    impatient: ServiceProcess, http: httpx.Client, visible: list[Path], key: bytes, path: str,
    abruptly: bool,
) -> None:  # fmt: skip
    images = [file.read_bytes() for file in visible[:3]]
    images = images[:1] if path == "/gallery" else images
    request = with_key(multipart(path, images), key)
    for part in (0.5, 1.0):  # in the middle of the body, and before the answer
        before = http.get("/gallery").json()["total"]
        connections = [connect(impatient) for _ in range(2)]  # one alone would not have to wait
        for connection in connections:
            connection.sendall(request[: int(len(request) * part)])
        if part == 1:
            wait_for(lambda: gauge(http, "cmt_embed_waiting") > 0, "it does not reach the network")
        for connection in connections:
            vanish(connection, abruptly=abruptly)
        wait_until_idle(http)
        added = http.get("/gallery").json()["total"] - before
        # Where the machine was too slow to notice, all of one or both is there.
        noticed_late = (len(images), 2 * len(images)) if part == 1 and path != "/query" else ()
        assert added in (0, *noticed_late)


def test_hundreds_of_vanished_clients_leave_nothing_behind(
    impatient: ServiceProcess, http: httpx.Client, visible: list[Path], key: bytes
) -> None:
    images = [visible[0].read_bytes()] * 2
    requests = [with_key(multipart(path, images), key) for path in UPLOADS]
    requests.append(with_key(b"GET /gallery?limit=1000 HTTP/1.1\r\nHost: x\r\n\r\n", key))
    wait_until_idle(http)
    before, children = impatient.descriptors(), impatient.children()
    embedded = gauge(http, "cmt_embed_batch_size_sum")
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
    # 100 bodies came whole, 75 of them with two images: most were given up before the network.
    assert gauge(http, "cmt_embed_batch_size_sum") - embedded < 75
    assert http.post("/query", files={"image": images[0]}).status_code == 200


def test_many_slow_bodies_do_not_keep_a_query_from_being_answered(
    impatient: ServiceProcess, http: httpx.Client, visible: list[Path], key: bytes
) -> None:
    request = with_key(multipart("/gallery", [visible[0].read_bytes()]), key)
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(impatient)) for _ in range(50)]
        for connection in slow:
            connection.sendall(request[:-100])
        wait_for(lambda: gauge(http, "cmt_uploads_receiving") > 40, "they are not received")
        found = http.post("/query", files={"image": visible[0].read_bytes()})
        assert gauge(http, "cmt_uploads_receiving") > 40  # they are still there
        assert found.status_code == 200
        assert {answer(connection)[0] for connection in slow} == {408}
