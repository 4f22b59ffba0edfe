"""Hostile file names, headers, paths and bytes: a problem or of no importance, never a file."""

from __future__ import annotations

import json
import socket
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.service.conftest import Serve
from tests.service.hostile import FOLDER_NAME, KEPT, REFUSED, answers_are_data  # noqa: F401 - fixtures

HOSTILE_NAMES = [
    b"../../../../tmp/hostile-escape.jpg",
    b"/tmp/hostile-escape.jpg",
    b"..\\\\..\\\\hostile-escape.jpg",
    b'hostile-escape.jpg\\"; name=\\"person_id',
    b"hostile-escape\0.jpg",
    b"<script>hostile-escape</script>.svg",
    "\u202egpj.hostile-escape".encode(),
    b"\xff\xfehostile-escape",
    b"hostile-escape" * 1000,
    b"|touch hostile-escape",
    b"CON",
    b".",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: repr(name[:20]))
def test_the_name_of_a_file_is_of_no_importance(
    http: httpx.Client, image: bytes, name: bytes
) -> None:
    head = b'Content-Disposition: form-data; name="image"; filename="%b"\r\n' % name
    head += b"Content-Type: text/html; charset=../../etc/passwd\r\n"
    body = b"--b\r\n" + head + b"\r\n" + image + b"\r\n--b--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = http.post("/gallery", content=body, headers=kind)
    if answer.status_code == 201:
        path = f"/gallery/{answer.json()['id']}"
        assert FOLDER_NAME not in http.get(path).text
        stored = http.get(f"{path}/image")
        assert (stored.content, stored.headers["content-type"]) == (image, "image/jpeg")
        http.delete(path)
    else:
        assert answer.status_code in (400, 422)


@pytest.mark.parametrize("name", [*KEPT, *REFUSED])
def test_hostile_headers_change_nothing_but_their_request(
    http: httpx.Client, image: bytes, name: str
) -> None:
    text = {**KEPT, **REFUSED}[name][:8000].encode()
    for header in ("Idempotency-Key", "X-Request-ID", "Origin", "Content-Type", "traceparent"):
        headers: Any = {header: text}
        try:
            answer = http.post("/gallery", files={"image": image}, headers=headers)
        except httpx.LocalProtocolError:  # line breaks and NULs: httpx does not send them
            continue
        assert answer.status_code in (201, 400, 403, 415, 422)
        assert answer.headers["x-request-id"].isascii()
        assert header == "Idempotency-Key" or answer.headers["x-request-id"].isalnum()
        if answer.status_code == 201:
            http.delete(f"/gallery/{answer.json()['id']}")


@pytest.mark.parametrize(
    "line",
    [
        b"GET /livez\r\nX-Injected: 1 HTTP/1.1",
        b"GET /gallery/\xff\xfe HTTP/1.1",
        b"GET /gallery/%00%0d%0aSet-Cookie:x HTTP/1.1",
        b"GET /gallery?cursor=%0d%0aSet-Cookie:x HTTP/1.1",
        b"GET /../../../../etc/passwd HTTP/1.1",
        b"GET /docs/../../../../../etc/passwd HTTP/1.1",
        b"GET /docs/..%2f..%2f..%2fetc%2fpasswd HTTP/1.1",
        b"GET //evil.example/gallery HTTP/1.1",
        b"GET http://evil.example/gallery HTTP/1.1",
        b"GET /%252e%252e/ HTTP/1.1",
        b"GET /" + b"a" * 60_000 + b" HTTP/1.1",
        b"TRACE /gallery HTTP/1.1",
        b"\x16\x03\x01\x02\x00\x01 TLS",
        b"GET /livez HTTP/1.1\r\nContent-Length: -1",
        b"GET /livez HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2",
        b"GET /livez HTTP/1.1\r\nX: a\0b",
        b"GET /livez HTTP/1.1\r\n folded: header",
    ],
    ids=lambda line: repr(line[:40]),
)
def test_what_is_hardly_http_is_a_problem_too(http: httpx.Client, line: bytes) -> None:
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=60) as raw:
        raw.sendall(line + b"\r\nHost: localhost\r\n\r\n")
        answer = HTTPResponse(raw)
        answer.begin()
        body = answer.read()
    assert 400 <= answer.status < 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "set-cookie" not in answer.headers
    assert "x-injected" not in answer.headers
    assert {"type", "title", "status", "code", "detail"} <= json.loads(body).keys()
    assert b"root:" not in body


@pytest.mark.parametrize("name", [*KEPT, *REFUSED])
def test_ids_and_cursors_are_only_looked_up(http: httpx.Client, name: str) -> None:
    text = {**KEPT, **REFUSED}[name][:3000]
    assert http.get("/gallery", params={"cursor": text}).status_code == 422
    assert http.get("/admin/audit", params={"cursor": text}).status_code == 422
    path = f"/gallery/{quote(text, safe='')}"
    for answer in (
        http.get(path),
        http.get(f"{path}/image"),
        http.delete(path),
        http.patch(path, json={"person_id": "x"}),
        http.post("/admin/reembed", json={"checkpoint": text}),
    ):
        assert answer.status_code in (404, 405, 422)
        assert answer.json()["code"] in (
            "item_not_found", "route_not_found", "method_not_allowed", "parameters_invalid"
        )  # fmt: skip


def test_nothing_is_created_outside_the_data_folder(
    serve: Serve, tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All hostile texts once more, with an eye on the files."""
    inside, outside = tmp_path / "a" / "b" / "data", tmp_path / "elsewhere"
    outside.mkdir()
    monkeypatch.chdir(outside)
    escaped = Path("/tmp") / FOLDER_NAME
    assert not escaped.exists()
    with serve(inside) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for text in KEPT.values():
            files = {"image": (text, image)}
            labels = {"person_id": text, "camera_id": text, "metadata": json.dumps({text: text})}
            assert client.post("/gallery", files=files, data=labels).status_code == 201
            client.post("/query", files=files, data={"person_id": text})
            client.post("/admin/backup")
    assert list(outside.iterdir()) == []
    assert not list(tmp_path.rglob(f"*{FOLDER_NAME}*"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["data"]
    assert not list(escaped.parent.glob(f"{FOLDER_NAME}*"))
