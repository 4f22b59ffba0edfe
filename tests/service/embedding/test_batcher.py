"""Micro-batches: who is embedded with whom, and what happens when that fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from service.embedding.batcher import EmbeddingBatcher
from service.errors import EmbeddingFailed, MemoryExhausted, RuntimeUnavailable
from service.images.decode import Crop
from service.kit.device_loss import on_device_loss


def crop(number: int) -> Crop:
    """A crop that `Network` recognises by its width."""
    picture = Image.new("RGB", (16, 32))
    return Crop(picture, "rgb", "given", number, 32, 8, "", b"", "image/png")


class Network:
    """Gives every crop its number as features; fails where it is told to.

    It waits for `go` before each batch, so that a test decides what has come together.
    """

    def __init__(self, *, most: int = 1000, bad: int | None = None) -> None:
        self.most, self.bad = most, bad
        self.sizes: list[int] = []
        self.calls = 0
        self.go = threading.Event()
        self.go.set()

    def __call__(self, crops: Sequence[Crop]) -> Tensor:
        self.calls += 1
        assert self.go.wait(60)
        if len(crops) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any(one.width == self.bad for one in crops):
            raise ValueError("this picture is not for me")
        self.sizes.append(len(crops))
        return torch.tensor([float(one.width) for one in crops]).view(-1, 1, 1)


def run(network: Network, work: Callable[[EmbeddingBatcher], Any], **options: Any) -> Any:
    """Run `work` beside a queue before `network`."""

    async def both() -> Any:
        queue = EmbeddingBatcher(network, **{"max_batch": 8, "max_wait": 0.0, **options})
        runners = [asyncio.create_task(queue.run()) for _ in range(options.get("streams", 1))]
        try:
            return await asyncio.wait_for(work(queue), 60)
        finally:
            for running in runners:
                running.cancel()

    return asyncio.run(both())


async def until(probe: Callable[[], bool]) -> None:
    """Let the others on until it is so; `run` bounds the wait."""
    while not probe():
        await asyncio.sleep(0.001)


async def embed(
    queue: EmbeddingBatcher, numbers: Sequence[int], *, query: bool = False
) -> list[Any]:
    calls = [queue.embed(crop(number), query=query) for number in numbers]
    return await asyncio.gather(*calls, return_exceptions=True)


def test_everybody_gets_their_own_features_in_batches_that_are_full() -> None:
    network = Network()

    async def work(queue: EmbeddingBatcher) -> None:
        found = await embed(queue, range(20))
        assert [float(one.features) for one in found] == list(range(20))
        assert all(one.waited >= 0 for one in found)
        assert all(one.took > 0 for one in found)

    run(network, work)
    assert network.sizes == [8, 8, 4]


def test_a_lone_crop_does_not_wait_and_a_wait_gathers_company() -> None:
    for_ever = 3600.0

    async def one_after_another(queue: EmbeddingBatcher, present: int) -> None:
        with queue.in_flight(present):
            for number in (1, 2):
                await queue.embed(crop(number), query=True)

    for present, max_wait in ((1, for_ever), (2, 0.0)):
        network = Network()
        work = partial(one_after_another, present=present)
        run(network, work, max_wait=max_wait, max_batch=2)
        assert network.sizes == [1, 1]

    async def in_company(queue: EmbeddingBatcher) -> None:
        with queue.in_flight(2):
            first = asyncio.create_task(queue.embed(crop(1), query=True))
            await until(lambda: len(queue) == 1)
            await asyncio.gather(first, queue.embed(crop(2), query=True))

    network = Network()
    run(network, in_company, max_wait=for_ever, max_batch=2)
    assert network.sizes == [2]


def test_what_waits_is_shared_out_among_the_streams() -> None:
    network = Network()

    async def work(queue: EmbeddingBatcher) -> None:
        await embed(queue, range(7))

    run(network, work, streams=2)
    assert sorted(network.sizes) == [3, 4]


def test_what_comes_while_a_crop_is_embedded_has_the_other_streams() -> None:
    network = Network()

    async def work(queue: EmbeddingBatcher) -> None:
        network.go.clear()
        first = asyncio.create_task(embed(queue, [1]))
        await until(lambda: network.calls == 1)
        others = [asyncio.create_task(embed(queue, [n])) for n in (2, 3)]
        await until(lambda: network.calls == 2)
        assert len(queue) == 0  # the other stream takes both, for there is no third
        network.go.set()
        await asyncio.gather(first, *others)

    run(network, work, streams=2)
    assert sorted(network.sizes) == [1, 2]


def test_queries_and_enrollments_share_a_batch() -> None:
    network = Network()
    order: list[int] = []

    async def work(queue: EmbeddingBatcher) -> None:
        async def noted(number: int, query: bool) -> None:
            await queue.embed(crop(number), query=query)
            order.append(number)

        network.go.clear()
        blocking = asyncio.create_task(noted(0, True))
        await until(lambda: network.calls == 1)  # the others come together meanwhile
        bulk = [asyncio.create_task(noted(100 + n, False)) for n in range(12)]
        await until(lambda: len(queue) == 12)
        asked = [asyncio.create_task(noted(n, True)) for n in range(1, 4)]
        await until(lambda: len(queue) == 15)
        network.go.set()
        await asyncio.gather(blocking, *bulk, *asked)

    run(network, work)
    # The first batch after it holds all three queries, though twelve enrollments came before.
    assert set(order[1:9]) == {1, 2, 3, *range(100, 105)}


def test_one_bad_crop_fails_alone() -> None:
    network = Network(bad=5)

    async def work(queue: EmbeddingBatcher) -> None:
        found = await embed(queue, range(8))
        assert isinstance(found.pop(5), EmbeddingFailed)
        assert [float(one.features) for one in found] == [0, 1, 2, 3, 4, 6, 7]
        assert queue.limit == 8

    run(network, work)


def test_exhausted_memory_halves_the_batches_until_it_is_back() -> None:
    network = Network(most=2)

    async def work(queue: EmbeddingBatcher) -> None:
        found = await embed(queue, range(8))
        assert [float(one.features) for one in found] == list(range(8))
        assert queue.limit <= 2
        network.sizes.clear()
        await embed(queue, range(6))
        assert network.sizes == [2, 2, 2]  # not tried with more any longer
        network.most = 1000
        await embed(queue, range(600))
        assert queue.limit == 8
        assert max(network.sizes) == 8

    run(network, work)


def test_no_memory_for_one_crop_is_an_error_that_passes() -> None:
    network = Network(most=0)

    async def work(queue: EmbeddingBatcher) -> None:
        [error] = await embed(queue, [1])
        assert isinstance(error, MemoryExhausted)
        assert (error.status, error.headers["Retry-After"]) == (503, "10")
        network.most = 10
        assert float((await queue.embed(crop(1), query=True)).features) == 1

    run(network, work)


def test_the_cancelled_leave_the_queue() -> None:
    network = Network()

    async def work(queue: EmbeddingBatcher) -> None:
        network.go.clear()
        first = asyncio.create_task(queue.embed(crop(0), query=True))
        await until(lambda: network.calls == 1)
        others = [asyncio.create_task(queue.embed(crop(n), query=True)) for n in (1, 2, 3)]
        await until(lambda: len(queue) == 3)
        others[1].cancel()
        first.cancel()  # under way already: nobody waits for it any longer
        await until(lambda: len(queue) == 2)
        network.go.set()
        done = await asyncio.gather(first, *others, return_exceptions=True)
        cancelled = [isinstance(one, asyncio.CancelledError) for one in done]
        assert cancelled == [True, False, True, False]

    run(network, work)
    assert network.sizes == [1, 2]


def test_a_lost_device_is_reported_and_asked_nothing_more() -> None:
    told: list[str] = []

    class Lost(Network):
        def __call__(self, crops: Sequence[Crop]) -> Tensor:
            self.sizes.append(len(crops))
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for …")

    network = Lost()
    with on_device_loss(told.append):
        outcomes = run(network, partial(embed, numbers=range(4)))
    assert network.sizes == [4]
    assert [type(outcome) for outcome in outcomes] == [RuntimeUnavailable] * 4
    assert all(int(outcome.headers["Retry-After"]) > 0 for outcome in outcomes)
    assert told == ["CUDA error: unspecified launch failure"]
