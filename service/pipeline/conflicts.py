"""Trying again where something else changed the gallery in the middle of a request."""

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
    """What `attempt` returns, tried again while the checkpoint is being changed under it, or
    another request enrolls with the same key.

    Raises the ModelVersionConflict or IdempotencyConflict of the last of `TRIES` tries.
    """
    for _ in range(TRIES - 1):
        try:
            return await attempt()
        except (IdempotencyConflict, ModelVersionConflict):
            await sleep(WAIT)
    return await attempt()
