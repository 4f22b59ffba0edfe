"""Run coroutines concurrently, raising their first error itself; and run calls in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import Any, TypeVar

T = TypeVar("T")


async def gathered(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all → their results in order.

    The first error cancels the others and is raised itself, not in an ExceptionGroup.
    """
    calls = list(calls)
    if len(calls) == 1:
        return [await calls[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as several:
        raise several.exceptions[0] from several
    return [task.result() for task in tasks]


async def in_thread(threads: Executor, call: Callable[[], T]) -> T:
    """Run a call in one of `threads`, with the caller's context variables.

    If cancelled, a call that has not begun never runs; one that has begun runs to its end, and its
    result is discarded.
    """
    context = copy_context()
    return await asyncio.get_running_loop().run_in_executor(threads, context.run, call)
