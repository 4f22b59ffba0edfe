"""Run coroutines side by side, with their first error as it is."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import TypeVar

from anyio import create_task_group

T = TypeVar("T")


async def gathered(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The results in order. The first error cancels the others and is raised, not in a group."""
    results: dict[int, T] = {}

    async def run(place: int, call: Awaitable[T]) -> None:
        results[place] = await call

    try:
        async with create_task_group() as group:
            for place, call in enumerate(calls):
                group.start_soon(run, place, call)
    except ExceptionGroup as several:
        raise several.exceptions[0] from several
    return [results[place] for place in range(len(results))]
