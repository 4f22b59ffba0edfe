"""The HTTP benchmark measures real servers; its arithmetic, and that of the fusion's, by hand."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import CMT, load_checkpoint, save_checkpoint
from model.benchmark import Spread
from model.cli import main
from service.bench.crops import BenchmarkDataError
from service.bench.fusion import fusion, ways
from service.bench.plots import draw_processes
from service.bench.ranking import ranked
from service.bench.serve import headlines, serve
from service.bench.serving.figures import corrected_rate, percentiles
from service.bench.serving.load import LoadError, measure, request
from service.bench.serving.rivals import Batching, Route, Server, ServerError, batching, started
from service.bench.serving.several import Processes
from service.bench.serving.trace import summary
from service.embedding.embedder import Embedder
from tests.paths import MINI


def report(path: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(path.read_text())
    return written


def assert_ordered(spread: dict[str, float]) -> None:
    assert 0 < spread["least"] <= spread["median"] <= spread["most"]


def test_percentiles_lie_between_the_nearest_latencies() -> None:
    assert percentiles([0.4, 0.1, 0.3, 0.2, 0.5])["p50"] == pytest.approx(0.3)
    assert percentiles([float(i) for i in range(101)]) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([0.0, 1.0]) == pytest.approx({"p50": 0.5, "p95": 0.95, "p99": 0.99})
    assert percentiles([2.0]) == {"p50": 2, "p95": 2, "p99": 2}


def test_the_corrected_rate_takes_off_what_the_generator_computed() -> None:
    assert corrected_rate(100, 10.0, 0.0, cores=2) == 10
    # Four CPU seconds are two of ten seconds of two cores.
    assert corrected_rate(100, 10.0, 4.0, cores=2) == pytest.approx(12.5)
    assert corrected_rate(100, 10.0, 4.0, cores=8) == pytest.approx(100 / 9.5)


class Answers(BaseHTTPRequestHandler):
    """200, 503 and a connection that closes, in turn; the bodies are kept."""

    protocol_version = "HTTP/1.1"
    bodies: list[tuple[str, bytes]]
    count = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.append((self.headers["Content-Type"], body))
        kind, Answers.count = Answers.count % 3, Answers.count + 1
        if kind == 2:
            self.close_connection = True
            return
        self.send_response(503 if kind else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def unreliable() -> Iterator[int]:
    """The port of a server that answers as `Answers` does."""
    Answers.bodies, Answers.count = [], 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_address[1]
        server.shutdown()


def test_the_load_generator_counts_failures_apart(unreliable: int, tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(file.name.encode() * 3)
    load = measure(unreliable, "/upload", files, clients=2, seconds=0.5)
    assert set(load.errors) == {"503", "connection"}
    assert load.latencies
    assert all(latency > 0 for latency in load.latencies)
    assert load.seconds >= 0.5  # as long as it was asked to measure
    assert load.cpu_seconds > 0
    sent = set()
    for content_type, body in Answers.bodies:
        head = f"Content-Type: {content_type}\r\n\r\n".encode()
        whole, part = BytesParser().parsebytes(head + body).walk()
        assert whole.is_multipart()
        assert part.get_param("name", header="Content-Disposition") == "image"
        sent.add(part.get_payload(decode=True))
    assert sent == {b"aaa", b"bbb"}


def test_a_load_without_one_success_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(LoadError, match="connection"):
        measure(1, "/upload", [tmp_path / "a"], clients=1, seconds=0.2)


def test_a_request_says_how_long_it_is() -> None:
    head, _, body = request("/query", b"\r\n\r\nimage").partition(b"\r\n\r\n")
    assert head.startswith(b"POST /query HTTP/1.1\r\n")
    assert f"Content-Length: {len(body)}".encode() in head


def test_the_stages_of_a_query_add_up_to_what_its_client_has_waited() -> None:
    queries = [
        {"decode": 1.0, "embed": 2.0 + more, "outside the service": 0.5, "client": 3.5 + more}
        for more in (0.0, 1.0, 2.0)
    ]
    found = summary(queries, bare=1.5)
    assert found["neither decoding nor the bare model, ms"] == Spread(2.0, 1.0, 3.0)
    assert found["stages, ms"]["client"].median == 4.5
    assert found["in no stage, ms"] == 0


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    image = tmp_path / "a"
    image.write_bytes(b"a")
    command = ("sh", "-c", "echo no memory; exit 1")
    server = Server("ours", command, (Route("POST /query", "/query", [image]),))
    with pytest.raises(ServerError, match="no memory"), started(server, tmp_path / "log"):
        pass


def test_batches_of_another_kind_are_a_side_of_their_own(tmp_path: Path) -> None:
    routes = tuple(Route(f"POST {path}", path, [tmp_path / "a"]) for path in ("/query", "/gallery"))
    (tmp_path / "a").write_bytes(b"a")
    tells = ("sh", "-c", "echo $CMT_MAX_BATCH of $CMT_BATCH_WAIT; exit 1")
    other = batching(Server("ours", tells, routes), Batching.parse("2:0.01"))
    assert (other.side, other.routes) == ("ours, batches of 2 after 0.01 s", routes[:1])
    with pytest.raises(ServerError, match=r"2 of 0\.01"), started(other, tmp_path / "log"):
        pass


def test_serve_measures_all_sides(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Beside other tests, the servers' threads would only wait for one another.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    serve(
        tiny_checkpoint, None, MINI / "cam3", MINI / "cam1", gallery=30, clients="1",
        seconds=0.5, rounds=1, against=None, overload=1, device="cpu", runtime="torch",
        plot=tmp_path / "serve.png", json=tmp_path / "r.json",
    )  # fmt: skip
    written = report(tmp_path / "r.json")
    assert written["machine"]["cpu"]
    bare = [r for r in written["results"] if r["side"] == "bare model"]
    assert [r["batch"] for r in bare] == [1, 8, 32]
    best = max(r["images per second"]["median"] for r in bare)
    crowds = [r for r in written["results"] if r["side"] == "ours, max_pending 1"]
    assert [(r["route"], r["clients"]) for r in crowds] == [("POST /query", 1), ("POST /query", 10)]
    assert (crowds[0]["errors"], set(crowds[1]["errors"])) == ({}, {"429"})
    assert "p99, times that at saturation" not in crowds[0]
    few, many = (r["p99, ms"]["median"] for r in crowds)
    assert crowds[1]["p99, times that at saturation"]["median"] == pytest.approx(many / few)
    few, many = (r["requests per second"]["median"] for r in crowds)
    assert crowds[1]["rate, times that at saturation"]["median"] == pytest.approx(many / few)
    [row] = [row for row in headlines(written) if "ten times the load" in row.what]
    assert row.rival == "at saturation, 1 client"
    assert float(row.times.split()[0]) == pytest.approx(
        1 / crowds[1]["p99, times that at saturation"]["median"], rel=0.01
    )
    others = [r for r in written["results"] if r not in [*bare, *crowds]]
    loads = {(r["side"], r["route"]): r for r in others}
    assert list(loads) == [
        ("ours", "POST /query"),
        ("ours", "POST /gallery"),
        ("naive FastAPI", "POST /embed"),
        ("naive FastAPI", "POST /rank"),
        ("LitServe", "POST /embed"),
    ]
    for r in loads.values():
        assert r["clients"] == 1
        assert r["errors"] == {}
        assert r["requests"] > 0
        corrected = r["requests per second, corrected"]["median"]
        assert corrected > r["requests per second"]["median"] > 0
        assert r["share of the bare model"]["median"] == pytest.approx(corrected / best)
        p50, p95, p99 = (r[f"{quantile}, ms"]["median"] for quantile in ("p50", "p95", "p99"))
        assert 0 < p50 <= p95 <= p99
        assert "requests / (seconds" in r["correction"]
    query = loads["ours", "POST /query"]
    alone = 1e3 / bare[0]["images per second"]["median"]
    assert query["ms over the bare model"]["median"] == pytest.approx(
        query["p50, ms"]["median"] - alone
    )
    assert {"decode", "queue", "embed", "audit", "client"} <= set(query["stages, ms"])
    assert query["in no stage, ms"] < 0.01
    assert query["bare model, ms"] == pytest.approx(alone)
    shown = capsys.readouterr().out
    assert "neither decoding nor the bare model" in shown
    assert re.search(r"ten times the load \(10 clients\): p99 \d+\.\d\d times", shown)
    assert re.search(r"times the rate of LitServe, POST /embed: \d+\.\d+ with 1 clients", shown)
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_replicas_are_measured_together(
    tiny_checkpoint: Path, tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "servers").mkdir()
    with closing(Embedder(tiny_checkpoint, "cpu", "torch")) as embedder:
        folders = MINI / "cam3", MINI / "cam1"
        servers = Processes(tmp_path / "servers", tiny_checkpoint, embedder, folders, postgres_url)
        servers.fill(20)
        servers.round([], [2], [1], 1.0)
    rows = servers.results()
    assert [(r["kind"], r["processes"], r["route"], r["clients"]) for r in rows] == [
        ("replicas", 2, route, 1) for route in ("POST /query", "POST /gallery")
    ]
    for row in rows:
        assert row["errors"] == {}
        assert row["requests per second"].median > 0
        assert 0 < row["p50, ms"].median <= row["p99, ms"].median
    draw_processes(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_replicas_need_a_database(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scale", "--replicas", "1,2"]) == 2
    assert "give --database-url" in capsys.readouterr().err


def test_serve_needs_crops(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkDataError, match="no image"):
        serve(tiny_checkpoint, None, tmp_path, MINI / "cam1", device="cpu", runtime="torch")


def test_ranking_by_hand() -> None:
    # One query: items by distance are match, other, match → AP (1/1 + 2/3) / 2, INP 2/3.
    distances = np.array([[0.1, 0.3, 0.2]])
    matches = np.array([[True, True, False]])
    everything = np.ones((1, 3), dtype=bool)
    assert ranked(distances, matches, everything) == pytest.approx((1, 5 / 6, 2 / 3))
    # Without its nearest match: other, match.
    left = np.array([[False, True, True]])
    assert ranked(distances, matches, left) == pytest.approx((0, 1 / 2, 1 / 2))
    # A second query without a match changes nothing; one whose match is first, the means.
    none = np.array([[False, False, False]])
    assert ranked(
        np.vstack([distances] * 2), np.vstack([matches, none]), np.vstack([left, everything])
    ) == pytest.approx((0, 1 / 2, 1 / 2))
    assert ranked(
        np.vstack([distances] * 2), np.vstack([matches] * 2), np.vstack([left, everything])
    ) == pytest.approx((1 / 2, 2 / 3, 7 / 12))
    # At equal distance the first item comes first.
    same = np.array([[0.5, 0.5]])
    second = np.array([[False, True]])
    assert ranked(same, second, np.ones((1, 2), dtype=bool)) == pytest.approx((0, 1 / 2, 1 / 2))


def test_the_ways_to_rank_several_images(tiny_model: CMT) -> None:
    generator = torch.Generator().manual_seed(0)
    config = tiny_model.config

    def unit(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, config.parts * config.dim, generator=generator)
        drawn = drawn / drawn.norm(dim=-1, keepdim=True)
        return torch.unflatten(drawn, -1, (config.parts, config.dim))

    x, y = unit(3, 2), unit(5)
    with torch.inference_mode():
        both = ways(tiny_model, x, y)
        singles = [ways(tiny_model, x[:, k : k + 1], y) for k in (0, 1)]
    modulated = [single["mean, modulated"] for single in singles]
    for single in singles:
        for way in ("smallest distance of K", "mean distance of K"):
            assert torch.allclose(single[way], single["mean, modulated"], atol=1e-5)
    assert torch.allclose(both["smallest distance of K"], torch.minimum(*modulated), atol=1e-5)
    assert torch.allclose(both["mean distance of K"], torch.stack(modulated).mean(0), atol=1e-5)
    mean = x.mean(1)
    mean = mean / mean.flatten(1).norm(dim=1)[:, None, None]
    plain = torch.cdist(mean.flatten(1), y.flatten(1))
    assert torch.allclose(both["mean, unmodulated"], plain, atol=1e-5)
    assert not torch.allclose(both["mean, modulated"], plain, atol=1e-2)


def test_fusion_compares_the_ways(tiny_checkpoint: Path, tmp_path: Path) -> None:
    fusion([MINI], tiny_checkpoint, shots="1,2", draws=3, json=tmp_path / "r.json")
    written = report(tmp_path / "r.json")
    assert written["command"].startswith("cmt bench fusion --root ")
    results = {(r["direction"], r["K"], r["way"]): r for r in written["results"]}
    assert len(results) == 2 * 2 * 4
    cameras = {"infrared → visible": (1, 2, 4, 5), "visible → infrared": (3, 6)}
    for (direction, k, way), r in results.items():
        assert r["people in the gallery"] == 8
        assert r["queries"] == 8
        assert r["gallery"] == sum(
            len(list((MINI / f"cam{c}").iterdir())) for c in cameras[direction]
        )
        for name in ("rank-1", "mAP", "mINP"):
            assert 0 <= r[name]["mean"] <= 1
            assert r[name]["deviation"] >= 0
        if k == 1 and "distance" in way:
            assert r["mAP"] == pytest.approx(results[direction, 1, "mean, modulated"]["mAP"])


def test_fusion_leaves_out_who_was_trained_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    network, _ = load_checkpoint(tiny_checkpoint)
    people = sorted(int(folder.name) for folder in (MINI / "cam1").iterdir())
    save_checkpoint(tmp_path / "all.safetensors", network, training={"identities": people})
    with pytest.raises(BenchmarkDataError, match="trained on everybody"):
        fusion([MINI], tmp_path / "all.safetensors")
    save_checkpoint(tmp_path / "six.safetensors", network, training={"identities": people[:6]})
    fusion([MINI], tmp_path / "six.safetensors", "1", 1, json=tmp_path / "r.json")
    assert {r["people in the gallery"] for r in report(tmp_path / "r.json")["results"]} == {2}
    with pytest.raises(BenchmarkDataError, match="13 images"):
        fusion([MINI], tiny_checkpoint, "1,13", 1)
