"""A request whose images take long to decode holds up no other one."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.service.processes import ServiceProcess, assert_no_defect, gauge, wait_for

IMAGES = 96


def dear_image() -> bytes:
    """A large picture in a form that takes long."""
    rows, columns = np.mgrid[0:2000, 0:2500]
    pixels = np.stack([rows % 251, columns % 241, (rows + columns) // 3 % 239], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=50, progressive=True)
    return buffer.getvalue()


def test_queries_and_readiness_do_not_wait_for_a_batch_that_takes_long(
    tmp_path: Path, tiny_checkpoint: Path, visible: list[Path]
) -> None:
    dear = dear_image()
    begun = time.process_time()
    Image.open(io.BytesIO(dear)).load()
    budget = 60 * (time.process_time() - begun)  # whatever the machine: for some images, not all
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


def send_batch(service: ServiceProcess, images: list[bytes]) -> list[dict[str, Any]]:
    with service.client(timeout=120) as http:
        answer = http.post("/gallery/batch", files=[("image", image) for image in images])
    assert answer.status_code == httpx.codes.OK
    results: list[dict[str, Any]] = answer.json()["results"]
    return results
