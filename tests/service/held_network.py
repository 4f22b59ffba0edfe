"""A service whose network a test can hold: what is embedded waits there, as long as it has to."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from torch import Tensor

from service.embedding.embedder import Embedder
from service.images.decode import Crop

PATIENCE = 120.0  # seconds until a test that forgot the network is called stuck


class HeldNetwork:
    """Goes before `Embedder.embed` of the services that start while it is in place.

    batches: the crops of every call, noted before it is held.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[Crop]] = []
        self._go = threading.Event()
        self._go.set()
        embed = Embedder.embed

        def held(embedder: Embedder, crops: Sequence[Crop]) -> Tensor:
            self.batches.append([*crops])
            assert self._go.wait(PATIENCE), "the network is never let go"
            return embed(embedder, crops)

        monkeypatch.setattr(Embedder, "embed", held)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is embedded meanwhile."""
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    def count(self, data: bytes) -> int:
        """How many crops of an upload have come to the network."""
        return sum(crop.data == data for batch in self.batches for crop in batch)
