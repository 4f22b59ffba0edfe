"""Crops of all requests wait here and are embedded together: dynamic micro-batches.

A batch is what has arrived while the previous ones were embedded, up to `max_batch`, half of it
queries and half enrollments where both wait. A crop that makes a batch fail fails alone: the batch
is halved until that crop is by itself. Running out of memory halves the following batches too. A
device that is lost is reported and embeds nothing more.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from service.errors import (
    EmbeddingFailed,
    MemoryExhausted,
    ModelVersionConflict,
    RuntimeUnavailable,
    ServiceError,
)
from service.images.decode import Crop
from service.kit.device_loss import LOST, report_loss
from service.kit.memory import is_out_of_memory

log = logging.getLogger(__name__)


_RECOVER = 64  # batches without trouble after which a halved limit is doubled again


class Embedded(NamedTuple):
    """Features P×D of a crop, the seconds that it waited and those that its batch took."""

    features: Tensor
    waited: float
    took: float


@dataclass(eq=False)
class _WaitingCrop:
    crop: Crop
    done: asyncio.Future[Embedded]
    since: float = field(default_factory=time.perf_counter)


class EmbeddingBatcher:
    """Embeds the crops of all requests in batches. Used on one event loop.

    `run` must be running, once for each batch that may be embedded at the same time. embed: B crops
    → B×P×D. max_batch: crops at once. max_wait: seconds that the first of a batch waits for others,
    if any are `in_flight`. streams: of the device, among which the waiting crops are divided.
    observe: called with the size of every batch.
    """

    def __init__(
        self,
        embed: Callable[[Sequence[Crop]], Tensor],
        *,
        max_batch: int,
        max_wait: float,
        streams: int = 1,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._embed, self._observe = embed, observe
        self.max_batch, self._max_wait = max_batch, max_wait
        self._streams, self._busy = streams, 0
        self._in_flight = 0
        self.limit = max_batch  # at present, less after memory ran out
        self._smooth = 0
        self._retired = False
        self._queries: deque[_WaitingCrop] = deque()
        self._enrollments: deque[_WaitingCrop] = deque()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        """Crops that wait."""
        return len(self._queries) + len(self._enrollments)

    async def embed(self, crop: Crop, *, query: bool) -> Embedded:
        """Wait for the features of a crop. If cancelled, the crop leaves the queue.

        Raises EmbeddingFailed, MemoryExhausted, or ModelVersionConflict after `retire`.
        """
        if self._retired:
            raise _retired()
        waiting = _WaitingCrop(crop, asyncio.get_running_loop().create_future())
        queue = self._queries if query else self._enrollments
        queue.append(waiting)
        self._arrived.set()
        try:
            return await waiting.done
        except asyncio.CancelledError:
            with suppress(ValueError):  # it may be in a batch already
                queue.remove(waiting)
            raise

    def embed_at_once(self, crop: Crop) -> Embedded:
        """Embed a crop in the calling thread, beside what `run` does. Raises as `embed`."""
        if self._retired:
            raise _retired()
        began = time.perf_counter()
        (outcome,) = self._halving([crop])
        if isinstance(outcome, Exception):
            raise outcome
        return Embedded(outcome, 0.0, time.perf_counter() - began)

    @property
    def pictures(self) -> int:
        """Those that are in flight."""
        return self._in_flight

    @contextmanager
    def in_flight(self, pictures: int = 1) -> Iterator[None]:
        """Count pictures from decoding to the answer, not only while their crops wait here.

        A request that is busy elsewhere will send a crop, or its client may soon send another
        request: that others are in flight is the best guess at whether more crops arrive soon.
        """
        self._in_flight += pictures
        try:
            yield
        finally:
            self._in_flight -= pictures

    def retire(self) -> None:
        """Accept no more crops; `run` ends once the waiting ones are embedded."""
        self._retired = True
        self._arrived.set()

    async def run(self) -> None:
        """Embed batch after batch, until cancelled or retired."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "embed") as thread:
            while len(self) or not self._retired:
                await self._wait_for_batch()
                batch = self._take()
                if not batch:
                    continue
                self._busy += 1
                began = time.perf_counter()
                try:
                    outcomes = await loop.run_in_executor(thread, self._outcomes, batch)
                finally:
                    self._busy -= 1
                took = time.perf_counter() - began
                for waiting, outcome in zip(batch, outcomes, strict=True):
                    if waiting.done.done():  # cancelled meanwhile
                        continue
                    if isinstance(outcome, Exception):
                        waiting.done.set_exception(outcome)
                    else:
                        waiting.done.set_result(Embedded(outcome, began - waiting.since, took))

    def _others(self) -> bool:
        return self._in_flight > 1 or len(self) > 1

    async def _wait_for_batch(self) -> None:
        """Return when a batch is due, or when retired with nothing waiting.

        It is due when it is full, when its first crop has waited long enough, or when no other
        crop is expected.
        """
        while not len(self):
            if self._retired:
                return
            self._arrived.clear()
            await self._arrived.wait()
        first = min(queue[0].since for queue in (self._queries, self._enrollments) if queue)
        while 0 < len(self) < self.limit and self._others():
            left = first + self._max_wait - time.perf_counter()
            if left <= 0:
                return
            self._arrived.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _take(self) -> list[_WaitingCrop]:
        """The next batch, from both queues in turn, each in the order of arrival.

        It is one free stream's share of what waits.
        """
        share = math.ceil(len(self) / max(1, self._streams - self._busy))
        most = min(self.limit, share)
        batch: list[_WaitingCrop] = []
        while len(batch) < most and len(self):
            for queue in (self._queries, self._enrollments):
                if queue and len(batch) < most:
                    waiting = queue.popleft()
                    if not waiting.done.done():
                        batch.append(waiting)
        return batch

    def _outcomes(self, batch: Sequence[_WaitingCrop]) -> list[Tensor | ServiceError]:
        outcomes = self._halving([waiting.crop for waiting in batch])
        self._smooth += 1
        if self._smooth >= _RECOVER and self.limit < self.max_batch:
            self.limit, self._smooth = min(2 * self.limit, self.max_batch), 0
        return outcomes

    def _halving(self, crops: Sequence[Crop]) -> list[Tensor | ServiceError]:
        try:
            features = self._embed(crops)
            self._observe(len(crops))
            return list(features)
        except Exception as error:
            if report_loss(error):
                return [RuntimeUnavailable(LOST, headers={"Retry-After": "10"}) for _ in crops]
            exhausted = is_out_of_memory(error)
            if exhausted:
                self.limit, self._smooth = max(1, min(self.limit, len(crops) // 2)), 0
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                log.warning("no memory for a batch of %d crops", len(crops))
            if len(crops) == 1:
                return [_failure(error, exhausted)]
        middle = len(crops) // 2
        return self._halving(crops[:middle]) + self._halving(crops[middle:])


def _retired() -> ModelVersionConflict:
    return ModelVersionConflict("another checkpoint is in use by now; try again")


def _failure(error: Exception, exhausted: bool) -> ServiceError:
    if exhausted:
        return MemoryExhausted(
            "there is no memory to embed one image; stop what else uses the device",
            headers={"Retry-After": "10"},
        )
    log.error("an image could not be embedded", exc_info=error)
    return EmbeddingFailed("the network fails on this image; the service's log has the details")
