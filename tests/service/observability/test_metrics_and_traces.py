"""Request ids, logs, metrics and traces: what an operator sees of a request."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.auth.authorization import ROUTE_SCOPES
from service.observability.logs import configure_logs
from tests.service.conftest import Serve
from tests.service.processes import wait_for


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """The service's log as JSON; logging is as before afterwards."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    configure_logs("json", "debug", stream)
    yield stream
    root.handlers[:], root.level = handlers, level


def told(stream: io.StringIO, **wanted: Any) -> list[dict[str, Any]]:
    for handler in logging.getLogger().handlers:
        handler.flush()  # lines are written by a thread of their own
    parsed = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [one for one in parsed if wanted.items() <= one.items()]


def samples(http: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def grown(before: dict[Any, float], after: dict[Any, float], name: str, **labels: str) -> float:
    key = (name, frozenset(labels.items()))
    return after.get(key, 0.0) - before.get(key, 0.0)


def test_readable_lines_command_no_terminal(lines: io.StringIO) -> None:
    stream = io.StringIO()
    configure_logs("console", "info", stream)
    log = logging.getLogger("service")
    log.info("enrolled \x1b[2J\x9b31m\nforged line")
    try:
        raise ValueError("\x1b]0;title\x07")
    except ValueError:
        log.exception("failed")
    for handler in logging.getLogger().handlers:
        handler.flush()
    text = stream.getvalue()
    assert r"enrolled \x1b[2J\x9b31m\nforged line" in text
    assert r"ValueError: \x1b]0;title\x07" in text
    assert "Traceback (most recent call last):\n" in text
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_every_answer_has_a_request_id(http: httpx.Client) -> None:
    generated = {http.get("/livez").headers["x-request-id"] for _ in range(3)}
    assert len(generated) == 3
    given = http.get("/nothing", headers={"X-Request-ID": "gate-7.a_b"})
    assert (given.status_code, given.headers["x-request-id"]) == (404, "gate-7.a_b")
    for bad in ("a b", "x" * 65, "é".encode(), "<b>"):
        headers: Any = {"X-Request-ID": bad}
        assert http.get("/livez", headers=headers).headers["x-request-id"] != bad


def test_a_request_is_one_line_that_names_nobody(
    http: httpx.Client, visible: list[Path], lines: io.StringIO
) -> None:
    http.post(
        "/gallery",
        files={"image": ("secret-file.jpg", visible[0].read_bytes())},
        data={"person_id": "Ms Secret"},
        headers={"X-Request-ID": "enroll-1"},
    )
    http.get("/gallery", params={"person_id": "Ms Secret"}, headers={"X-Request-ID": "list-1"})

    def line_of(request_id: str) -> Any:  # it is written once the answer is sent
        [line] = wait_for(
            lambda: told(lines, event="request", request_id=request_id), "no line is written"
        )
        return line

    enrolled = line_of("enroll-1")
    assert (enrolled["method"], enrolled["route"], enrolled["status"]) == ("POST", "/gallery", 201)
    assert enrolled["ms"] > 0
    assert enrolled["actor"] == "address:127.0.0.1"
    listed = line_of("list-1")
    assert (listed["route"], listed["status"], listed["level"]) == ("/gallery", 200, "info")
    assert len(told(lines)) > 1
    assert "secret" not in lines.getvalue().lower()


def test_logs_of_libraries_are_json_too(lines: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").warning("a %s", "warning")
    try:
        raise ValueError("inside")
    except ValueError:
        logging.getLogger("service").exception("failed")
    warning, failed = told(lines)
    assert (warning["event"], warning["level"], warning["logger"]) == (
        "a warning",
        "warning",
        "uvicorn.error",
    )
    assert failed["exception"][0]["exc_type"] == "ValueError"


def test_metrics_count_requests_stages_and_refusals(
    http: httpx.Client, visible: list[Path], infrared: list[Path]
) -> None:
    before = samples(http)
    image = visible[0].read_bytes()
    item = http.post("/gallery", files={"image": image}).json()
    for file in infrared[:2]:
        assert http.post("/query", files={"image": file.read_bytes()}).is_success
    assert http.post("/query", files={"image": b"none"}).status_code == 415
    http.get(f"/gallery/{item['id']}")
    after = samples(http)
    enrolled = {"method": "POST", "route": "/gallery", "status": "201"}
    assert grown(before, after, "cmt_http_requests_total", **enrolled) == 1
    one = {"method": "GET", "route": "/gallery/{id}", "status": "200"}
    assert grown(before, after, "cmt_http_requests_total", **one) == 1
    queries = {"method": "POST", "route": "/query"}
    assert grown(before, after, "cmt_http_request_seconds_count", **queries) == 3
    refused = {"code": "image_type_unsupported"}
    assert grown(before, after, "cmt_rejections_total", **refused) == 1
    for stage in ("recall", "rescore", "fetch"):
        assert grown(before, after, "cmt_stage_seconds_count", stage=stage) == 2
    for stage in ("queue", "embed"):  # the built-in image may have come through as well
        assert grown(before, after, "cmt_stage_seconds_count", stage=stage) >= 3
    assert grown(before, after, "cmt_stage_seconds_count", stage="store") == 1
    assert grown(before, after, "cmt_embed_batch_size_count") >= 3
    assert grown(before, after, "cmt_gallery_items") == 1
    model = http.get("/model").json()["fingerprint"]
    assert any(
        name == "cmt_model_info" and ("fingerprint", model) in labels for name, labels in after
    )
    assert after["cmt_uploads_pending", frozenset()] == 0
    assert after["cmt_http_requests_in_flight", frozenset()] == 0


def test_unknown_paths_make_no_new_series(http: httpx.Client) -> None:
    for number in range(5):
        http.get(f"/nothing/{number}")
        http.request(f"METHOD{number}", "/nothing")
        http.request(f"METHOD{number}", "/livez")
    routes = {dict(labels).get("route") for _, labels in samples(http)} - {None}
    assert routes <= {path for _, path in ROUTE_SCOPES} | {"none"}
    methods = {dict(labels).get("method") for _, labels in samples(http)} - {None}
    assert methods <= {"GET", "POST", "PATCH", "DELETE", "any"}


class Collector(BaseHTTPRequestHandler):
    """Takes what an OTLP exporter sends."""

    bodies: list[bytes] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_traces_go_to_a_collector(serve: Serve, tmp_path: Path, visible: list[Path]) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    Collector.bodies.clear()
    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serve(tmp_path, otlp_endpoint=endpoint) as url:
        files = {"image": visible[0].read_bytes()}
        httpx.post(
            f"{url}/query",
            files=files,
            headers={"traceparent": parent},
            trust_env=False,
            timeout=60,
        )
    server.shutdown()
    spans = [
        span
        for body in Collector.bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    [request] = [span for span in spans if span.name == "POST /query"]
    assert request.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    mine = {span.name for span in spans if span.parent_span_id == request.span_id}
    assert {"receive", "decode", "queue", "embed", "recall", "rescore", "fetch"} <= mine
