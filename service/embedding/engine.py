"""The network in use: an embedder, and the batcher in front of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from anyio import create_task_group

from service.embedding.batcher import EmbeddingBatcher
from service.embedding.embedder import Embedder
from service.settings import Settings

_CUDA_RUNNERS = 2  # one batch is made ready while the device works on another
# For each stream of a CPU. ResNet-50, 32 clients (`cmt bench serve`): 26 queries a second one by
# one, 36 in batches of 8, 37 in batches of 16, which take twice as long to finish.
_BATCH = {"cpu": 8, "cuda": 32}


class EmbeddingEngine:
    """An embedder and its batcher. observe: called with the size of every batch."""

    def __init__(
        self, embedder: Embedder, settings: Settings, observe: Callable[[int], None]
    ) -> None:
        self.embedder = embedder
        self.batcher = EmbeddingBatcher(
            embedder.embed,
            max_batch=settings.max_batch or _BATCH[torch.device(embedder.device).type],
            max_wait=settings.batch_wait,
            streams=embedder.backend.streams,
            observe=observe,
        )

    @property
    def model(self) -> str:
        """The checkpoint's fingerprint."""
        return self.embedder.info.fingerprint

    async def run(self) -> None:
        """Embed batch after batch, until cancelled or retired."""
        cuda = torch.device(self.embedder.device).type == "cuda"
        async with create_task_group() as group:
            for _ in range(_CUDA_RUNNERS if cuda else self.embedder.backend.streams):
                group.start_soon(self.batcher.run)
