"""Coroutines that run at the same time."""

from __future__ import annotations

import asyncio

import pytest

from service.errors import ImageEmpty
from service.kit.concurrency import gathered


def test_results_are_in_order_whoever_ends_first() -> None:
    async def run() -> list[int]:
        ended = [asyncio.Event() for _ in range(3)]

        async def one(place: int) -> int:
            if place + 1 < len(ended):
                await ended[place + 1].wait()  # the last one ends first
            ended[place].set()
            return place

        return await gathered(one(place) for place in range(3))

    assert asyncio.run(run()) == [0, 1, 2]


@pytest.mark.parametrize("others", [0, 2])
def test_the_first_error_itself_is_raised_once_the_others_are_cancelled(others: int) -> None:
    cancelled = []

    async def waiting(name: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(name)

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ImageEmpty("the image has 0 bytes; send the file's content")

    async def run() -> None:
        with pytest.raises(ImageEmpty, match="0 bytes"):
            await gathered([*map(waiting, range(others)), failing()])

    asyncio.run(run())
    assert sorted(cancelled) == list(range(others))
