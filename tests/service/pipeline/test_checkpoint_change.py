"""Another checkpoint's network takes over: nothing waits for ever, and the old one is let go."""

from __future__ import annotations

import asyncio
import gc
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from model import CMT, load_checkpoint, save_checkpoint
from service.client import Client
from service.embedding.batcher import EmbeddingBatcher
from service.embedding.embedder import Embedder
from service.errors import ModelVersionConflict
from service.images.decode import Crop, decode
from tests.service.conftest import Serve
from tests.service.processes import wait_for


def embedders() -> int:
    gc.unfreeze()  # services of other tests in this process have frozen theirs
    gc.collect()
    return sum(type(one) is Embedder for one in gc.get_objects())


def test_the_network_of_old_is_let_go(
    serve: Serve, tiny_checkpoint: Path, tmp_path: Path, visible: list[Path]
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    shutil.copy(tiny_checkpoint, first)
    torch.manual_seed(8)
    save_checkpoint(second, CMT(load_checkpoint(first)[1].config).eval(), training={})
    before = embedders()
    with serve(tmp_path / "data", checkpoint=first) as url, Client(url) as client:
        item = client.enroll(visible[0])
        for name in (second.name, first.name, second.name):
            client.reembed(name)
            done: Callable[[], bool] = lambda: client.reembed_status().state == "done"  # noqa: E731
            wait_for(done, "it is not embedded again")
            answer = client.query(visible[0], modulation=False)
            assert [result.item.id for result in answer.results] == [item.id]
        wait_for(lambda: embedders() <= before + 1, "networks of old are kept")


def zeros(crops: Sequence[Crop]) -> Tensor:
    return torch.zeros(len(crops), 1, 2)


@pytest.fixture
def crop(visible: list[Path]) -> Crop:
    return decode(visible[0].read_bytes())


def test_a_retired_queue_embeds_what_waits_and_ends(crop: Crop) -> None:
    async def scenario() -> None:
        queue = EmbeddingBatcher(zeros, max_batch=2, max_wait=0)
        waiting = [asyncio.create_task(queue.embed(crop, query=True)) for _ in range(5)]
        await asyncio.sleep(0)
        queue.retire()
        async with asyncio.timeout(60):
            await queue.run()
        features: list[Tensor] = [(await one).features for one in waiting]
        assert len(features) == 5
        with pytest.raises(ModelVersionConflict):
            await queue.embed(crop, query=True)

    asyncio.run(scenario())


def test_a_queue_that_is_empty_ends_when_it_is_retired() -> None:
    async def scenario() -> None:
        queue = EmbeddingBatcher(zeros, max_batch=2, max_wait=0)
        running = [asyncio.create_task(queue.run()) for _ in range(2)]
        await asyncio.sleep(0.05)
        queue.retire()
        async with asyncio.timeout(60):
            await asyncio.gather(*running)

    asyncio.run(scenario())


def test_a_stored_crop_is_decoded_again_whatever_the_limits_of_today_are(
    serve: Serve, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    large = io.BytesIO()
    Image.linear_gradient("L").resize((4600, 4400)).save(large, "PNG")  # 20.2 million pixels
    with serve(tmp_path, max_image_pixels=21_000_000) as url, Client(url) as client:
        client.enroll(large.getvalue())
    with serve(tmp_path, max_image_bytes=10_000) as url, Client(url) as client:
        client.reembed()
        wait_for(lambda: client.reembed_status().state != "running", "it does not end")
        status = client.reembed_status()
        assert (status.state, status.done, status.detail) == ("done", 1, None)
