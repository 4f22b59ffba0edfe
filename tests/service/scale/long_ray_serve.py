"""Ray Serve: the same application, and networks that Ray starts as needed. Takes minutes.

`make scale-check` runs it.
"""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import ray
from ray import serve

from service.ray_app import build
from tests.service.scale.conftest import Nodes


def test_the_same_application_with_as_many_networks_as_are_needed(
    tmp_path: Path, nodes: Nodes, tiny_checkpoint: Path, visible: list[Path]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"checkpoint": tiny_checkpoint, "data_dir": tmp_path, "runtime": "torch"}
    given["host"] = "127.0.0.1"
    of_ray = {"engine": "ray", "shards": 2, "most_networks": 2, "network_cpus": 0.1}
    ray.init(address=nodes.address, namespace="cmt", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        application = build({name: str(value) for name, value in (given | of_ray).items()})
        serve.run(application, name="cmt")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
            assert http.get("/readyz").json() == {"status": "ok"}
            ids = [enrolled(http, crop) for crop in visible]
            files = {"image": visible[2].read_bytes()}
            asked = {"modulation": "false", "rerank": "none"}
            answer = http.post("/query", files=files, data=asked).json()
            assert answer["results"][0]["item"]["id"] == ids[2]
            assert (answer["shards_ok"], answer["shards_total"]) == (2, 2)
            assert http.get("/model").json()["runtime"] == "ray"
            assert networks() == 1
            deadline = time.monotonic() + 120
            with ThreadPoolExecutor(6) as clients:  # more than one network works on at once
                while networks() < 2:
                    assert time.monotonic() < deadline, "no second network is started"
                    list(clients.map(lambda crop: enrolled(http, crop), visible * 6))
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def enrolled(http: httpx.Client, crop: Path) -> str:
    answer = http.post("/gallery", files={"image": crop.read_bytes()})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def networks() -> int:
    """Replicas of the network that run."""
    deployments = serve.status().applications["cmt"].deployments
    states = deployments["network"].replica_states.items()
    return sum(count for state, count in states if state == "RUNNING")
