"""Answers that are given while the client still sends: directly, and through proxies.

The proxies run with the blocks of docs/operations.md; one that is not installed is left out.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from tests.paths import ROOT
from tests.service.processes import (
    ServiceProcess,
    assert_no_defect,
    gauge,
    kept_port,
    multipart,
    wait_for,
    wait_until_idle,
)

LARGE, SMALL = 90_000_000, 3_000_000  # bytes of bodies: over the limit, and under it
EVIL = "Origin: https://evil.example\r\n"


@pytest.fixture(scope="module")
def service(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, visible: list[Path]
) -> Iterator[ServiceProcess]:
    """A service that believes proxies on this machine and receives one upload at a time."""
    with ServiceProcess(
        tmp_path_factory.mktemp("data"),
        tiny_checkpoint,
        max_receiving=1,
        trusted_proxies=["127.0.0.1"],
    ) as running:
        with running.client() as http:
            for file in visible:
                assert http.post("/gallery", files={"image": file.read_bytes()}).is_success
        yield running
        assert_no_defect(running)


def stubborn(
    address: tuple[str, int],
    size: int,
    head: str = "",
    *,
    version: str = "1.1",
    path: str = "/gallery",
    chunked: bool = False,
) -> tuple[int, httpx.Headers, str]:
    """Send all of a body before anything is read → status, headers and code of the answer."""
    kind = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    lines = (
        f"POST {path} HTTP/{version}\r\nHost: {address[0]}:{address[1]}\r\n{head}{kind}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    block = bytes(100_000)
    sent = b"%x\r\n%b\r\n" % (len(block), block) if chunked else block
    with socket.create_connection(address, timeout=60) as connection:
        try:
            connection.sendall(lines.encode())
            for _ in range(size // len(block)):
                connection.sendall(sent)
            if chunked:
                connection.sendall(b"0\r\n\r\n")
        except ConnectionError:  # a proxy may have closed it: its answer is to be there
            pass
        answer = b""
        while b'"instance"' not in answer and (received := connection.recv(65536)):
            answer += received
    top, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = top.decode().split("\r\n")
    parted = [field.partition(": ") for field in fields]
    headers = httpx.Headers([(name, value) for name, _, value in parted])
    code = re.search(r'"code":"(\w+)"', body.decode())
    return int(status.split()[1]), headers, code[1] if code else ""


@pytest.mark.parametrize(
    ("status", "code", "arguments"),
    [
        (413, "body_too_large", {"size": LARGE}),
        (413, "body_too_large", {"size": LARGE, "version": "1.0"}),
        (413, "body_too_large", {"size": LARGE, "head": "Connection: close\r\n"}),
        (413, "body_too_large", {"size": LARGE, "chunked": True}),
        (403, "origin_refused", {"size": LARGE, "head": EVIL}),
        (403, "origin_refused", {"size": SMALL, "head": EVIL, "version": "1.0"}),
        (404, "route_not_found", {"size": SMALL, "path": "/nothing"}),
        (405, "method_not_allowed", {"size": SMALL, "path": "/readyz", "chunked": True}),
        (400, "form_malformed", {"size": SMALL}),
        (400, "request_malformed", {"size": SMALL, "head": "Host: twice\r\n"}),
    ],
)
def test_an_early_answer_arrives(
    service: ServiceProcess, status: int, code: str, arguments: dict[str, object]
) -> None:
    answer = stubborn(service.address, **arguments)  # type: ignore[arg-type]
    assert (answer[0], answer[2]) == (status, code)
    assert answer[1]["content-type"] == "application/problem+json"


def test_a_client_that_asks_first_is_told_not_to_send(service: ServiceProcess) -> None:
    head = f"Expect: 100-continue\r\n{EVIL}"
    with socket.create_connection(service.address, timeout=60) as connection:
        connection.sendall(
            f"POST /gallery HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: 9\r\n\r\n".encode()
        )
        answer = b""
        while received := connection.recv(65536):  # its end: the next request is no body
            answer += received
    assert answer.startswith(b"HTTP/1.1 403")
    assert b"connection: close" in answer.lower()


def test_what_asks_first_and_may_send_is_received(
    service: ServiceProcess, visible: list[Path]
) -> None:
    head, body = multipart("/query", [visible[0].read_bytes()]).split(b"\r\n\r\n", 1)
    with socket.create_connection(service.address, timeout=60) as connection:
        connection.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/livez", "/nothing"])
def test_a_small_answer_is_sent_in_one_piece(service: ServiceProcess, path: str) -> None:
    """Its head alone would wake the client for nothing."""
    with socket.create_connection(service.address, timeout=60) as connection:
        for _ in range(20):
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
            assert f"content-length: {len(body)}" in head.decode().lower().split("\r\n")
            assert json.loads(body)


def test_connections_that_are_read_to_their_end_hold_no_place(
    service: ServiceProcess, visible: list[Path]
) -> None:
    """They are closed after a while without a byte, however many there are."""
    before = service.descriptors()
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(service.address, timeout=60))
            for _ in range(300)
        ]
        for connection in slow:
            connection.sendall(
                b"POST /gallery HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b"
            )
        for connection in slow:
            assert connection.recv(65536).startswith(b"HTTP/1.1 413")
        with service.client() as http:
            image = {"image": visible[0].read_bytes()}
            assert http.post("/query", files=image).status_code == 200
        wait_for(lambda: service.descriptors() <= before + 10, "they stay open")


# --- proxies ---


def block(language: str) -> str:
    """The configuration of a proxy in docs/operations.md."""
    text = (ROOT / "docs" / "operations.md").read_text()
    [found] = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return str(found)


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """A text with each of `pairs` (pattern, replacement) replaced; every pattern is there."""
    for pattern, replacement in pairs:
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert count, pattern
    return text


def nginx(service: str, here: str, folder: Path) -> list[str]:
    server = replaced(
        block("nginx"),
        (r"127\.0\.0\.1:8000", service),
        (r"listen .*;", f"listen {here};"),
        (r"^ *ssl_.*\n", ""),
    )
    places = "".join(
        f"{name}_temp_path {folder / name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user}daemon off;\npid {folder / 'pid'};\nerror_log {folder / 'log'};\nevents {{}}\n"
        f"http {{\naccess_log off;\n{places}{server}}}\n"
    )
    return ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "log")]


def caddy(service: str, here: str, folder: Path) -> list[str]:
    site = replaced(
        block("caddyfile"), (r"127\.0\.0\.1:8000", service), (r"^reid\.example", f"http://{here}")
    )
    (folder / "Caddyfile").write_text(f"{{\nadmin off\n}}\n{site}")
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


def haproxy(service: str, here: str, folder: Path) -> list[str]:
    text = replaced(block("haproxy"), (r"127\.0\.0\.1:8000", service), (r"bind .*", f"bind {here}"))
    (folder / "haproxy.cfg").write_text(text)
    return ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """Where the proxies listen, one after the other."""
    with kept_port() as port:
        yield "127.0.0.1", port


@pytest.fixture(scope="module", params=[nginx, caddy, haproxy], ids=lambda make: make.__name__)
def proxy(
    request: pytest.FixtureRequest,
    service: ServiceProcess,
    address: tuple[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, int]]:
    """The address of a proxy before the service."""
    make: Callable[[str, str, Path], list[str]] = request.param
    if shutil.which(make.__name__) is None:
        pytest.skip(f"{make.__name__} is not installed")
    folder = tmp_path_factory.mktemp(make.__name__)
    target, here = (f"{host}:{port}" for host, port in (service.address, address))
    environment = {**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            make(target, here, folder), env=environment, stdout=output, stderr=output
        )
    try:

        def answers() -> bool:
            assert process.poll() is None, (folder / "output").read_text()
            with closing(socket.socket()) as tried:
                return tried.connect_ex(address) == 0

        wait_for(answers, f"{make.__name__} does not start")
        yield address
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def http(proxy: tuple[str, int]) -> Iterator[httpx.Client]:
    """Plain HTTP through the proxy."""
    url = f"http://{proxy[0]}:{proxy[1]}"
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        yield client


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_an_early_answer_arrives_through_a_proxy(proxy: tuple[str, int], version: str) -> None:
    status, _, code = stubborn(proxy, LARGE, version=version)
    assert (status, code) == (413, "body_too_large")
    status, _, code = stubborn(proxy, SMALL, EVIL, version=version)
    assert (status, code) == (403, "origin_refused")


def test_who_is_refused_for_overload_is_told_when_to_come_again(
    service: ServiceProcess, proxy: tuple[str, int], visible: list[Path]
) -> None:
    with (
        service.client() as direct,
        socket.create_connection(service.address, timeout=60) as slow,
    ):
        slow.sendall(multipart("/gallery", [visible[0].read_bytes()])[:-50])
        wait_for(lambda: gauge(direct, "cmt_uploads_receiving") == 1, "it is not received")
        for _ in range(5):
            status, headers, code = stubborn(proxy, SMALL)
            assert (status, code, headers["retry-after"]) == (429, "overloaded", "1")
        slow.close()
        wait_until_idle(direct)


def test_a_backup_comes_whole_through_a_proxy(http: httpx.Client, visible: list[Path]) -> None:
    answer = http.post("/admin/backup")
    assert answer.status_code == 200
    with zipfile.ZipFile(io.BytesIO(answer.content)) as backup:
        assert backup.testzip() is None
        assert len(backup.namelist()) >= 1


def test_a_proxy_says_who_calls_and_by_which_name(http: httpx.Client) -> None:
    claims = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Prefix": "/evil"}
    own = {"Origin": str(http.base_url).rstrip("/"), **claims}  # the Host has its port
    assert http.get("/gallery", headers=own).status_code == 200
    newest = http.get("/admin/audit?limit=1").json()["entries"][0]
    assert newest["actor"] == "address:127.0.0.1"
    assert "servers" not in http.get("/openapi.json", headers=claims).json()
