"""Retries where something else changed the gallery in the middle of a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from anyio import sleep

from service.errors import IdempotencyConflict, ModelVersionConflict

T = TypeVar("T")

# A change of checkpoint reaches the gallery first and the pipeline a moment later.
TRIES = 20
WAIT = 0.1  # seconds between two tries


async def retried(attempt: Callable[[], Awaitable[T]]) -> T:
    """Run `attempt` → its result, retried on a conflict with something concurrent.

    That is a change of the checkpoint, or another request that enrolls with the same key. Raises
    the ModelVersionConflict or IdempotencyConflict of the last of `TRIES` tries.
    """
    for _ in range(TRIES - 1):
        try:
            return await attempt()
        except (IdempotencyConflict, ModelVersionConflict):
            await sleep(WAIT)
    return await attempt()
