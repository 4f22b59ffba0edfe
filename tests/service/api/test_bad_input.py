"""Whatever is sent, the answer is a 4xx problem with a stable code, and the gallery unchanged."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from service.server import ServerError, bind
from tests.service.conftest import Serve
from tests.service.processes import wait_for

DEEP = "[" * 5000 + "]" * 5000


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and brings one compressed row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    row = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + row + chunk(b"IEND", b"")


CROP = encoded(Image.linear_gradient("L").resize((64, 128)).convert("RGB"), "PNG")
FRAMES = [Image.new("RGB", (64, 128), (shade, 0, 0)) for shade in (10, 200)]

BAD_IMAGES = {
    "no bytes": (b"", 422, "image_empty"),
    "text": (b"this is no image", 415, "image_type_unsupported"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "image_type_unsupported"),
    "gif": (encoded(Image.new("L", (64, 128)), "GIF"), 415, "image_type_unsupported"),
    "truncated": (CROP[: len(CROP) // 2], 422, None),
    "1×1": (encoded(Image.new("RGB", (1, 1)), "PNG"), 422, "image_too_small"),
    "30,000×30,000": (png_header(30_000, 30_000), 413, "image_too_large"),
    "frames": (
        encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
        422,
        "image_multi_frame",
    ),
    "animation": (
        encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
        422,
        "image_multi_frame",
    ),
}

BAD_ENROLL_FIELDS = [
    {"modality": "thermal"},
    {"modality": "RGB"},
    {"metadata": "{"},
    {"metadata": "[1]"},
    {"metadata": "7"},
    {"metadata": '{"a": NaN}'},
    {"metadata": '{"a": 1, "b": 2, "a": 3}'},
    {"metadata": '{"a": 1e999}'},
    {"metadata": '{"a": "\\u0000"}'},
    {"metadata": '{"\\u0000": 1}'},
    {"metadata": '{"a": "\\ud800"}'},
    {"metadata": '{"a": ' + "9" * 5000 + "}"},
    {"metadata": '{"a": ' + DEEP + "}"},
    {"metadata": '{"a": ' + "[" * 40 + "]" * 40 + "}"},
    {"metadata": json.dumps({"a": "x" * 9000})},
    {"captured_at": "2026-03-01T14:05:00"},
    {"captured_at": "2026-03-01"},
    {"captured_at": "1700000000"},
    {"captured_at": "2026-02-30T00:00:00Z"},
    {"captured_at": "2026-03-01T25:00:00Z"},
    {"captured_at": "0001-01-01T00:00:00+14:00"},
    {"captured_at": "9999-12-31T23:59:59-12:00"},
    {"captured_at": "2026-03-01T14:05:00+99:99"},
    {"captured_at": "yesterday"},
    {"captured_at": "2016-12-31T12:30:60Z"},
    {"captured_at": "2016-12-31T23:59:61Z"},
    {"captured_at": "9999-12-31T23:59:60Z"},
    {"person_id": "x" * 129},
    {"person_id": "a\0b"},
    {"camera_id": "line\nbreak"},
    {"box": "1,2,3"},
    {"box": "0,0,16,16"},
    {"box": "0,0,-16,32"},
    {"box": "60,0,16,32"},
    {"box": "0,0,9999999,32"},
    {"box": "0.0,0,16,32"},
    {"box": "a,b,c,d"},
    {"persn_id": "typo"},
    {"modality": ["rgb", "ir"]},
    {"person_id": ["1", "2"]},
]

BAD_QUERY_FIELDS = [
    {"modality": "thermal"},
    {"top_k": "0"},
    {"top_k": "1000000000"},
    {"top_k": "-1"},
    {"top_k": "ten"},
    {"top_k": "1e1"},
    {"candidates": "0"},
    {"candidates": "1000000000"},
    {"exhaustive": "perhaps"},
    {"modulation": "2"},
    {"group_by": "camera_id"},
    {"gallery_modality": "thermal"},
    {"person_id": "a\0b"},
    {"exclude_camera_id": ["ok", "x" * 129]},
    {"captured_from": "2026-03-01T14:05:00"},
    {"captured_to": "never"},
    {"captured_from": "2026-03-02T00:00:00Z", "captured_to": "2026-03-02T00:59:59+01:00"},
    {"max_distance": "-1"},
    {"max_distance": "nan"},
    {"max_distance": "inf"},
    {"box": "1,2,3"},
    {"explain": "x" * 1000},
    {"top_k": ["1", "2"]},
    {"metadata": "{}"},
]

BAD_PATHS = [
    ("GET", "/gallery?limit=0", 422),
    ("GET", "/gallery?limit=1001", 422),
    ("GET", "/gallery?limit=1000000000000000000000", 422),
    ("GET", "/gallery?cursor=nonsense", 422),
    ("GET", "/gallery?cursor=%00", 422),
    ("GET", "/gallery?cursor=" + "a" * 600, 422),
    ("GET", "/gallery?modality=thermal", 422),
    ("GET", "/gallery?person_id=%00", 422),
    ("GET", "/gallery?captured_from=2026-03-01", 422),
    ("GET", "/gallery?captured_from=2026-03-02T00:00:00Z&captured_to=2026-03-01T00:00:00Z", 422),
    ("GET", "/gallery?captured_to=2026-03-01T00:00:00Z&captured_from=2026-03-02T00:00:00Z", 422),
    ("GET", "/gallery?person=1", 422),
    ("GET", "/gallery/unknown", 404),
    ("GET", "/gallery/%00", 404),
    ("GET", "/gallery/0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10", 404),
    ("GET", "/gallery/0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10/image", 404),
    ("GET", "/gallery/..%2f..%2fetc%2fpasswd", 404),
    ("GET", "/gallery/", 404),
    ("GET", "/livez?x=1", 422),
    ("GET", "/nothing", 404),
    ("DELETE", "/gallery", 422),
    ("DELETE", "/gallery?person_id=", 422),
    ("DELETE", "/gallery?person_id=%00", 422),
    ("DELETE", "/gallery?camera_id=1", 422),
    ("DELETE", "/gallery/0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10", 404),
    ("PUT", "/gallery", 405),
    ("GET", "/query", 405),
]


@pytest.fixture(scope="module", autouse=True)
def one_item(http: httpx.Client, visible: list[Path]) -> None:
    """Something to lose."""
    assert http.post("/gallery", files={"image": visible[0].read_bytes()}).status_code == 201


@pytest.fixture(autouse=True)
def unchanged(http: httpx.Client) -> Iterator[None]:
    """No bad input may change the gallery."""
    before = http.get("/gallery").json()
    yield
    assert http.get("/gallery").json() == before
    assert http.get("/readyz").status_code == 200


def assert_problem(answer: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["status"]) == (status, status), body
    assert {"type", "title", "detail", "instance"} <= set(body)
    assert len(body["detail"]) > 10
    assert "\n" not in body["detail"]
    assert code is None or body["code"] == code
    return body


@pytest.mark.parametrize("route", ["/gallery", "/query"])
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(http: httpx.Client, route: str, name: str) -> None:
    data, status, code = BAD_IMAGES[name]
    assert_problem(http.post(route, files={"image": data}), status, code)
    if route == "/query":  # one bad image among good ones is told as well
        several = [("image", CROP), ("image", data), ("image", CROP)]
        assert_problem(http.post(route, files=several), status, code)


@pytest.mark.parametrize("fields", BAD_ENROLL_FIELDS, ids=lambda f: str(f)[:40])
def test_bad_enroll_fields(http: httpx.Client, fields: dict[str, str]) -> None:
    body = assert_problem(http.post("/gallery", files={"image": CROP}, data=fields), 422)
    if body["code"] == "parameters_invalid":
        assert [error["name"] for error in body["errors"]] == list(fields)
    else:
        assert "box" in fields


@pytest.mark.parametrize("fields", BAD_QUERY_FIELDS, ids=lambda f: str(f)[:40])
def test_bad_query_fields(http: httpx.Client, fields: dict[str, str]) -> None:
    body = assert_problem(
        http.post("/query", files={"image": CROP}, data=fields), 422, "parameters_invalid"
    )
    assert all(error["name"].split(".")[0] in fields for error in body["errors"])


@pytest.mark.parametrize(("method", "path", "status"), BAD_PATHS)
def test_bad_paths_and_parameters(http: httpx.Client, method: str, path: str, status: int) -> None:
    assert_problem(http.request(method, path), status)


def test_a_wrong_method_is_told_the_right_ones(http: httpx.Client) -> None:
    answer = http.options(f"/gallery/{'0' * 32}")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, GET, HEAD, PATCH"
    assert http.put("/gallery").headers["allow"] == "DELETE, GET, HEAD, POST"


@pytest.mark.parametrize("route", ["/gallery", "/query"])
def test_bad_forms(http: httpx.Client, route: str) -> None:
    plain = {"Content-Type": "multipart/form-data; boundary=b"}

    def post(body: bytes, headers: dict[str, str]) -> httpx.Response:
        return http.post(route, content=body, headers=headers)

    def part(name: str, value: str) -> bytes:
        return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()

    assert_problem(http.post(route, json={"image": "x"}), 415, "content_type_unsupported")
    assert_problem(http.post(route), 415, "content_type_unsupported")
    assert_problem(http.post(route, data={"modality": "ir"}), 415, "content_type_unsupported")
    charset = {"Content-Type": "multipart/form-data; boundary=b; charset=utf-7"}
    assert_problem(post(part("image", "x"), charset), 415, "content_type_unsupported")
    no_boundary = {"Content-Type": "multipart/form-data"}
    assert_problem(post(b"--b--", no_boundary), 400, "form_malformed")
    assert_problem(post(b"nonsense", plain), 400, "form_malformed")
    assert_problem(post(b"--b\r\nX: y\r\n\r\nz\r\n--b--", plain), 400, "form_malformed")
    huge = part("modality", "x" * 100_000) + b"--b--"
    assert_problem(post(huge, plain), 400, "form_malformed")
    many = b"".join(part("person_id", str(n)) for n in range(300)) + b"--b--"
    assert_problem(post(many, plain), 400, "form_malformed")
    # The image is missing, or is no file.
    assert_problem(post(part("modality", "ir") + b"--b--", plain), 422, "parameters_invalid")
    assert_problem(post(part("image", "text") + b"--b--", plain), 422, "parameters_invalid")
    files: list[tuple[str, bytes | tuple[str, bytes]]] = [
        ("image", CROP), ("modality", ("m.txt", b"ir"))
    ]  # fmt: skip
    assert_problem(http.post(route, files=files), 422, "parameters_invalid")
    assert_problem(
        http.post(f"{route}?modality=ir", files={"image": CROP}), 422, "parameters_invalid"
    )


@pytest.mark.parametrize("route", ["/gallery", "/gallery/batch", "/query"])
def test_nothing_of_a_form_that_is_cut_off_is_used(http: httpx.Client, route: str) -> None:
    """Its last field would have been left out: a label, a filter, the labels of a batch."""
    last = {"/gallery": "person_id", "/gallery/batch": "items", "/query": "camera_id"}[route]
    value = '[{"person_id":"greta"}]' if last == "items" else "greta"
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n'
    field = f'--b\r\nContent-Disposition: form-data; name="{last}"\r\n\r\n{value}'
    whole = head + CROP + b"\r\n" + field.encode()
    for end in ("", "\r\n", "\r\n--b", "\r\n--b\r\n", "\r\n--b-", "\r\n--c--\r\n"):
        answer = http.post(
            route,
            content=whole + end.encode(),
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
        assert_problem(answer, 400, "form_malformed")


@pytest.mark.parametrize("route", ["/gallery", "/query"])
@pytest.mark.parametrize(
    "text", ["Łukasz".encode("iso-8859-2"), "佐藤".encode("shift-jis"), b"\xff"]
)
def test_text_that_is_no_utf_8_is_refused(http: httpx.Client, route: str, text: bytes) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n'
    field = b'--b\r\nContent-Disposition: form-data; name="person_id"\r\n\r\n'
    answer = http.post(
        route,
        content=head + CROP + b"\r\n" + field + text + b"\r\n--b--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    )
    body = assert_problem(answer, 422, "parameters_invalid")
    assert body["errors"] == [{"name": "person_id", "detail": "must be text in UTF-8"}]


def test_too_many_images(http: httpx.Client) -> None:
    two = [("image", CROP)] * 2
    assert_problem(http.post("/gallery", files=two), 422, "parameters_invalid")
    assert_problem(http.post("/gallery", files=[("image", CROP)] * 9), 400, "form_malformed")
    seventeen = [("image", CROP)] * 17
    assert_problem(http.post("/query", files=seventeen), 422, "parameters_invalid")
    boxed = http.post("/query", files=two, data={"box": "0,0,16,32"})
    assert_problem(boxed, 422, "parameters_invalid")


def test_bad_idempotency_keys(http: httpx.Client) -> None:
    for key in ("", "x" * 256, "a b", "caf\xe9"):
        headers = [(b"Idempotency-Key", key.encode("latin-1"))]
        answer = http.post("/gallery", files={"image": CROP}, headers=headers)
        assert_problem(answer, 422, "parameters_invalid")


def test_bodies_over_the_limit(http: httpx.Client) -> None:
    assert_problem(http.post("/gallery", files={"image": bytes(20_500_000)}), 413)
    declared = http.post("/gallery", files={"image": bytes(25_000_000)})
    assert_problem(declared, 413, "body_too_large")

    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(25):
            yield bytes(1_000_000)
        yield b"\r\n--b--"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    undeclared = http.post("/gallery", content=chunks(), headers=headers)
    assert_problem(undeclared, 413, "body_too_large")


def test_a_body_that_is_announced_too_large_is_not_waited_for(http: httpx.Client) -> None:
    address = (http.base_url.host, http.base_url.port)
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(
            b"POST /gallery HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 900000000\r\n\r\n"
        )
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_slow_and_vanished_clients_hold_nothing(serve: Serve, tmp_path: Path) -> None:
    head = (
        b"POST /gallery HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b"
    )
    with (
        serve(tmp_path, max_receiving=1, body_timeout=0.5) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        address = (http.base_url.host, http.base_url.port)
        for _ in range(20):  # on a busy machine the query may come before the head or after the 408
            with socket.create_connection(address, timeout=60) as slow:
                slow.sendall(head)
                time.sleep(0.1)
                busy = http.post("/query", files={"image": CROP})
                if busy.status_code == 429:
                    assert b"408" in slow.recv(100)
                    break
        assert_problem(busy, 429, "overloaded")
        assert busy.headers["retry-after"] == "1"

        def is_free() -> bool:
            return http.post("/query", files={"image": CROP}).status_code == 200

        wait_for(is_free, "who is slow keeps a place")
        with socket.create_connection(address, timeout=60) as vanishing:
            vanishing.sendall(head)
        wait_for(is_free, "who is gone keeps a place")


def test_a_port_in_use_is_told_in_a_sentence() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ServerError, match="choose another with --port"):
            bind("127.0.0.1", taken.getsockname()[1])
