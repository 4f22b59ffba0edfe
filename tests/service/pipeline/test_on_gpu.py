"""The whole service on a GPU: it answers as on a CPU, and outlives a full memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.errors import RuntimeUnavailable
from tests.faked_device import FakedDevice
from tests.service.conftest import Serve


def posted(url: str, files: Sequence[Path], **fields: Any) -> list[dict[str, Any]]:
    """Answers to as many clients as there are files, in their order."""

    def post(file: Path) -> dict[str, Any]:
        image = {"image": file.read_bytes()}
        answer = httpx.post(url, files=image, data=fields, timeout=60, trust_env=False)
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    with ThreadPoolExecutor(len(files)) as clients:
        return list(clients.map(post, files))


def nearest(url: str, queries: Sequence[Path], ids: Sequence[str]) -> list[dict[int, float]]:
    """Each query's distances to what was enrolled, by its place in `ids`."""
    answers = posted(f"{url}/query", queries, top_k=len(ids), exhaustive="true")
    return [
        {ids.index(hit["item"]["id"]): hit["distance"] for hit in answer["results"]}
        for answer in answers
    ]


@pytest.mark.gpu
def test_it_answers_many_clients_as_on_a_cpu(
    device: str, serve: Serve, tmp_path: Path, visible: list[Path], infrared: list[Path]
) -> None:
    found = {}
    for name, folder in ((f"{device}:0", "there"), ("cpu", "here")):
        with serve(tmp_path / folder, device=name, max_batch=64) as url:
            assert httpx.get(f"{url}/model", trust_env=False, timeout=60).json()["device"] == name
            ids = [item["id"] for item in posted(f"{url}/gallery", visible)]
            found[name] = nearest(url, infrared, ids)
            assert httpx.get(f"{url}/readyz", trust_env=False, timeout=60).status_code == 200
    there, here = found.values()
    assert [one.keys() for one in there] == [one.keys() for one in here]
    for ours, theirs in zip(there, here, strict=True):
        assert len(ours) == len(visible)
        for place, distance in ours.items():
            assert distance == pytest.approx(theirs[place], abs=0.1)  # bf16 has three digits


def test_a_gpu_that_is_full_refuses_images_until_it_is_not(
    faked: FakedDevice, serve: Serve, tmp_path: Path, image: bytes
) -> None:
    files = {"image": image}
    with (
        serve(tmp_path, device="cuda") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        enrolled = http.post("/gallery", files=files)
        assert enrolled.status_code == 201
        budget, faked.budget = faked.budget, faked.used
        refused = http.post("/query", files=files)
        assert (refused.status_code, refused.json()["code"]) == (503, "memory_exhausted")
        assert int(refused.headers["retry-after"]) > 0
        faked.budget = budget
        [hit] = http.post("/query", files=files).json()["results"]
        assert hit["item"]["id"] == enrolled.json()["id"]


def test_a_gpu_that_is_not_there_is_a_sentence_before_anything_is_opened(
    faked: FakedDevice, serve: Serve, tmp_path: Path
) -> None:
    with (
        pytest.raises(RuntimeUnavailable, match="there is no GPU 1, only 1, counted from 0"),
        serve(tmp_path / "data", device="cuda:1"),
    ):
        pass
    assert not (tmp_path / "data" / "gallery.sqlite3").exists()
