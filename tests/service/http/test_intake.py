"""What a request says of itself: framing, target, method, what a proxy says, what is said twice."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from service.http.intake import Intake
from service.kit.urls import address_in, checked_prefix
from service.settings import SettingsError, load_settings
from tests.service.conftest import Serve
from tests.service.processes import multipart

NOBODY = "0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10"


def ask(http: httpx.Client, request: bytes) -> tuple[int, httpx.Headers, bytes, bool]:
    """Status, headers, body of the answer to a raw request, and whether the connection ends."""
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=60) as raw:
        raw.sendall(request)
        answer = HTTPResponse(raw, method=request.split()[0].decode())
        answer.begin()
        body = answer.read()
        headers = httpx.Headers(answer.getheaders())
        if headers.get("connection") != "close":
            return answer.status, headers, body, False
        return answer.status, headers, body, raw.recv(1) == b""


@pytest.mark.parametrize(
    "head",
    [
        b"GET /gallery HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Length: 30\r\n\r\n0\r\n\r\nGET /gallery HTTP/1.1\r\n\r\n",
        b"GET /gallery HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=["length first", "smuggled", "1.0"],
)
def test_a_body_with_two_lengths_is_refused_and_its_connection_closed(
    http: httpx.Client, head: bytes
) -> None:
    status, _, body, ended = ask(http, head)
    assert (status, json.loads(body)["code"], ended) == (400, "request_malformed", True)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: [\r\n\r\n",
        b"GET /nothing HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET /gallery HTTP/1.1\r\nHost: localhost:80:80\r\n\r\n",
        b"GET /gallery HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
        b"GET http:///gallery HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://user@localhost/gallery HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=repr,
)
def test_a_host_that_is_none_is_refused(http: httpx.Client, head: bytes) -> None:
    status, _, body, _ = ask(http, head)
    assert (status, json.loads(body)["code"]) == (400, "request_malformed")


def test_a_target_in_absolute_form_is_served(http: httpx.Client, visible: list[Path]) -> None:
    url = str(http.base_url)
    line = f"GET {url}/gallery?limit=1&person_id=nobody HTTP/1.1\r\nHost: ignored.example\r\n\r\n"
    status, _, body, _ = ask(http, line.encode())
    assert (status, json.loads(body)["total"]) == (200, 0)
    plain = multipart("/query", [visible[0].read_bytes()])
    assert ask(http, plain.replace(b" /query ", f" {url.upper()}/query ".encode(), 1))[0] == 200
    # The host of the target counts, so that no other name gets in.
    evil = b"GET http://evil.example/gallery HTTP/1.1\r\nHost: localhost\r\n\r\n"
    status, _, body, _ = ask(http, evil)
    assert (status, json.loads(body)["code"]) == (403, "origin_refused")


def test_head_is_answered_wherever_get_is(http: httpx.Client, visible: list[Path]) -> None:
    location = http.post("/gallery", files={"image": visible[0].read_bytes()}).headers["location"]
    for path in (
        "/livez", "/readyz", "/docs", "/docs/docs.js", "/openapi.json", "/model", "/gallery",
        "/gallery?limit=5", location, f"{location}/image", f"/gallery/{NOBODY}", "/gallery?limit=0",
        "/admin/audit", "/nothing",
    ):  # fmt: skip
        get, head = http.get(path), http.head(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
        if path != "/admin/audit":  # which has an entry more each time
            assert head.headers["content-length"] == get.headers["content-length"]
    wrong = http.head("/query")
    assert wrong.status_code == 405
    assert "HEAD" in http.put("/gallery").headers["allow"].split(", ")
    http.delete(location)


@pytest.mark.parametrize(
    "path",
    [
        "/gallery?limit=1&limit=2",
        "/gallery?cursor=a&cursor=b",
        "/gallery?captured_from=2026-01-01T00:00:00Z&captured_from=2026-01-01T00:00:00Z",
        "/admin/audit?limit=1&limit=1",
    ],
)
def test_what_is_said_once_may_not_be_said_twice(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert (answer.status_code, answer.json()["code"]) == (422, "parameters_invalid")
    [error] = answer.json()["errors"]
    assert error["detail"] == "must be given once"


def test_what_may_be_said_several_times_still_may(http: httpx.Client) -> None:
    several = "/gallery?person_id=a&person_id=b&camera_id=c&camera_id=d&modality=rgb&modality=ir"
    assert http.get(several).status_code == 200


def test_a_header_that_is_said_twice_is_refused(http: httpx.Client, visible: list[Path]) -> None:
    twice = [("Idempotency-Key", "one"), ("Idempotency-Key", "two")]
    answer = http.post("/gallery", files={"image": visible[0].read_bytes()}, headers=twice)
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"name": "Idempotency-Key", "detail": "must be given once"}]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("text", ["%FF", "%C3", "J%F6rg", "a%ED%A0%80"])
def test_a_query_string_that_is_no_utf_8_is_refused(
    http: httpx.Client, method: str, text: str
) -> None:
    """It would become U+FFFD, and name another person."""
    answer = http.request(method, f"/gallery?person_id={text}")
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"name": "person_id", "detail": "must be UTF-8"}]
    assert http.request(method, f"/gallery?{text}=x").status_code == 422
    assert http.request(method, f"/gallery/{text}").status_code == 422


def test_json_that_is_no_utf_8_is_refused(http: httpx.Client) -> None:
    body = '{"person_id": "Jörg"}'.encode("latin-1")
    answer = http.patch(
        f"/gallery/{NOBODY}", content=body, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "parameters_invalid")


# --- behind a proxy ---


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("203.0.113.7", "203.0.113.7"),
        (" 203.0.113.7:4711 ", "203.0.113.7"),
        ("2001:DB8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%25eth0]:80", "fe80::1"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("unknown", None),
        ("_hidden", None),
        ("", None),
        ("203.0.113", None),
        ("203.0.113.7:http", None),
        ("203.0.113.007", None),
        ("[203.0.113.7", None),
        ("2001:db8::1::2", None),
        ("<script>", None),
        ("3405803783", None),
    ],
)
def test_an_address_is_parsed_as_one(text: str, address: str | None) -> None:
    found = address_in(text)
    assert (None if found is None else str(found)) == address


@pytest.mark.parametrize(
    "path",
    ["reid", "//evil.example", "/a//b", "/../x", "/a/.", "/a b", "/a?b", "/a#b", "/é", "/a%2fb",
     "/\\evil", "https://x", "/a\n"],
)  # fmt: skip
def test_what_is_no_plain_path_is_no_prefix(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="no plain path"):
        checked_prefix(path)
    with pytest.raises(SettingsError, match="root_path"):
        load_settings(checkpoint=tmp_path / "c", data_dir=tmp_path, root_path=path)


@pytest.fixture(scope="module")
def mounted(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service that is shown under /reid, by proxies at three places."""
    proxies = ("127.0.0.1", "10.0.0.0/8", "2001:db8:1::/48")
    data = tmp_path_factory.mktemp("mounted")
    with (
        serve(data, root_path="/reid/", trusted_proxies=proxies) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        yield http


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ([], "127.0.0.1"),
        (["203.0.113.7"], "203.0.113.7"),
        (["198.51.100.1, 203.0.113.7"], "203.0.113.7"),  # the first one is what a client claims
        (["198.51.100.1", "203.0.113.7:99, 10.1.2.3"], "203.0.113.7"),
        (["[2001:db8:2::9]:55, [2001:db8:1::1]:66, 10.0.0.1"], "2001:db8:2::9"),
        (["10.9.9.9, 10.0.0.1"], "10.9.9.9"),
        (["::ffff:203.0.113.7, ::ffff:10.0.0.1"], "203.0.113.7"),
        (["unknown"], "127.0.0.1"),
        (["203.0.113.7,"], "127.0.0.1"),
        (["203.0.113.7, evil\t, 10.0.0.1"], "127.0.0.1"),
    ],
)
def test_the_client_is_the_last_address_before_the_trusted_proxies(
    mounted: httpx.Client, forwarded: list[str], client: str
) -> None:
    headers = [("X-Forwarded-For", value) for value in forwarded]
    assert mounted.get("/reid/gallery", headers=headers).status_code == 200
    newest = mounted.get("/reid/admin/audit?limit=1").json()["entries"][0]
    assert newest["actor"] == f"address:{client}"


def test_everything_stays_inside_the_prefix(mounted: httpx.Client, visible: list[Path]) -> None:
    image = {"image": visible[0].read_bytes()}
    # The proxy may take the prefix off or leave it; another one may state its own.
    for path, headers, prefix in (
        ("/reid", {}, "/reid"),
        ("", {}, "/reid"),
        ("", {"X-Forwarded-Prefix": "/desk/v2/"}, "/desk/v2"),
        ("", {"X-Forwarded-Prefix": "//evil.example"}, "/reid"),
        ("", {"X-Forwarded-Prefix": "/a, /b"}, "/reid"),
    ):
        made = mounted.post(f"{path}/gallery", files=image, headers=headers)
        assert made.headers["location"] == f"{prefix}/gallery/{made.json()['id']}"
        document = mounted.get(f"{path}/openapi.json", headers=headers).json()
        assert document["servers"] == [{"url": prefix}]
        wrong = mounted.put(f"{path}/gallery", headers=headers)
        assert wrong.headers["allow"] == "DELETE, GET, HEAD, POST"
        assert mounted.get(f"{path}/gallery/batch", headers=headers).status_code == 405
        assert mounted.get(f"{path}/livez", headers=headers).status_code == 200
    page = mounted.get("/reid/docs").text
    links = [part.split('"')[0] for mark in ('src="', 'href="') for part in page.split(mark)[1:]]
    assets = [urljoin("/reid/docs", link) for link in links if not link.startswith("data:")]
    assert len(assets) == 3
    for asset in assets:
        assert asset.startswith("/reid/")
        assert mounted.get(asset).status_code == 200
    assert mounted.get("/reidentification/livez").status_code == 404
    for method in ("GET", "HEAD"):
        answer = mounted.request(method, "/reid")
        assert (answer.status_code, answer.headers["location"]) == (308, "/reid/")
    assert mounted.post("/reid").status_code == 404
    followed = mounted.get("/reid", follow_redirects=True)
    assert followed.headers["content-type"].startswith("text/html")


def test_nobody_else_is_believed(http: httpx.Client, visible: list[Path]) -> None:
    claims = {
        "X-Forwarded-For": "203.0.113.7",
        "X-Forwarded-Prefix": "/desk",
        "X-Forwarded-Proto": "https",
    }
    made = http.post("/gallery", files={"image": visible[0].read_bytes()}, headers=claims)
    assert made.headers["location"] == f"/gallery/{made.json()['id']}"
    assert http.get("/openapi.json", headers=claims).json().get("servers") is None
    newest = http.get("/admin/audit?limit=1").json()["entries"][0]
    assert newest["actor"] == "address:127.0.0.1"
    http.delete(made.headers["location"])


@pytest.mark.parametrize(
    ("peer", "given", "scheme"),
    [
        ("10.0.0.1", ["https"], "https"),
        ("10.0.0.1", ["HTTPS, http"], "https"),
        ("10.0.0.1", ["http", "https"], "http"),
        ("10.0.0.1", ["javascript"], "http"),
        ("10.0.0.1", ["https, ftp"], "http"),
        ("10.0.0.1", [""], "http"),
        ("::ffff:10.0.0.1", ["https"], "https"),
        ("192.0.2.1", ["https"], "http"),
        ("no address", ["https"], "http"),
    ],
)
def test_the_scheme_is_one_that_a_trusted_proxy_states(
    peer: str, given: list[str], scheme: str
) -> None:
    seen = []

    async def app(scope: dict[str, object], _receive: object, _send: object) -> None:
        seen.append(scope["scheme"])

    async def nothing(*_: object) -> dict[str, object]:
        return {"type": "http.disconnect"}

    scope = {
        "type": "http", "http_version": "1.1", "method": "GET", "path": "/", "raw_path": b"/",
        "scheme": "http", "client": (peer, 1),
        "headers": [(b"x-forwarded-proto", value.encode()) for value in given],
    }  # fmt: skip
    intake = Intake(app, ["10.0.0.0/8"], "")  # type: ignore[arg-type]
    asyncio.run(intake(scope, nothing, nothing))  # type: ignore[arg-type]
    assert seen == [scheme]
