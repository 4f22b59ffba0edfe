"""A request whose images take long holds up no other one, and those of a caller end in order."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.service.conftest import Serve
from tests.service.held_network import HeldNetwork
from tests.service.processes import ServiceProcess, assert_no_defect, gauge, wait_for

IMAGES = 96


def dear_image() -> bytes:
    """A large picture in a form that takes long."""
    rows, columns = np.mgrid[0:2000, 0:2500]
    pixels = np.stack([rows % 251, columns % 241, (rows + columns) // 3 % 239], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=50, progressive=True)
    return buffer.getvalue()


def decoding(image: bytes) -> float:
    """Seconds of computing that an image takes."""
    begun = time.process_time()
    Image.open(io.BytesIO(image)).load()
    return time.process_time() - begun


def test_queries_and_readiness_do_not_wait_for_a_batch_that_takes_long(
    tmp_path: Path, tiny_checkpoint: Path, visible: list[Path]
) -> None:
    dear = dear_image()
    budget = 60 * min(decoding(dear) for _ in range(3))  # whatever the machine: for some, not all
    with (
        ServiceProcess(
            tmp_path / "data", tiny_checkpoint, decode_processes=1, decode_budget=budget
        ) as service,
        ThreadPoolExecutor(1) as other,
        service.client() as http,
    ):
        sent = other.submit(send_batch, service, [dear] * IMAGES)
        wait_for(lambda: gauge(http, "cmt_uploads_pending"), "the batch does not arrive")
        for file in visible[:2]:
            assert http.post("/query", files={"image": file.read_bytes()}).status_code == 200
            assert http.get("/readyz").status_code == 200
        assert not sent.done()  # the queries were answered before the batch that came first
        results = sent.result()
        assert_no_defect(service)
    codes = [one["problem"]["code"] if one["status"] != 201 else None for one in results]
    enrolled = codes.count(None)
    assert 0 < enrolled < IMAGES
    assert codes == [None] * enrolled + ["decode_budget_spent"] * (IMAGES - enrolled)


def test_batches_of_a_caller_are_embedded_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    """Else those that are sent side by side end together, and nothing is left to embed then."""
    first, second = (file.read_bytes() for file in visible[:2])
    order = embedded_in_order(HeldNetwork(monkeypatch), serve, tmp_path, first, second, "127.0.0.1")
    assert (order.count(first), order.count(second)) == (128, 128)
    assert 0 < order[: last(order, first)].count(second) < 64
    assert order[: last(order, first) // 2].count(second) <= 4  # which never wait


def test_the_batch_of_another_caller_takes_turns(
    monkeypatch: pytest.MonkeyPatch, serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    first, second = (file.read_bytes() for file in visible[:2])
    order = embedded_in_order(HeldNetwork(monkeypatch), serve, tmp_path, first, second, "127.0.0.2")
    assert order[: last(order, first)].count(second) > 64


def embedded_in_order(
    network: HeldNetwork, serve: Serve, data: Path, first: bytes, second: bytes, address: str
) -> list[bytes]:
    """Two batches of an image each → the images in the order in which the network has them.

    address: of the caller who sends the second one while the first one is at the network.
    """
    with (
        serve(data) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=120) as http,
        httpx.Client(
            base_url=url, timeout=120, transport=httpx.HTTPTransport(local_address=address)
        ) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        network.batches.clear()  # the service has looked at itself
        with network.held():
            sent = [threads.submit(post_batch, http, [first] * 128)]
            wait_for(lambda: network.count(first), "the first batch does not arrive")
            sent.append(threads.submit(post_batch, other, [second] * 128))
            wait_for(lambda: gauge(http, "cmt_uploads_pending") == 2, "the second one does not")
        for one in sent:
            assert {result["status"] for result in one.result()} == {201}
    return [crop.data for batch in network.batches for crop in batch]


def last(order: list[bytes], image: bytes) -> int:
    return len(order) - 1 - order[::-1].index(image)


def send_batch(service: ServiceProcess, images: list[bytes]) -> list[dict[str, Any]]:
    with service.client(timeout=120) as http:
        return post_batch(http, images)


def post_batch(http: httpx.Client, images: list[bytes]) -> list[dict[str, Any]]:
    answer = http.post("/gallery/batch", files=[("image", image) for image in images])
    assert answer.status_code == httpx.codes.OK
    results: list[dict[str, Any]] = answer.json()["results"]
    return results
