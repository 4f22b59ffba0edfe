"""A gallery of many items for a benchmark of servers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from service.bench.crops import decoded
from service.embedding.embedder import Embedder
from service.gallery import Gallery, NewItem

_BLOCK = 1000  # items of one transaction
_NOISE = 0.1  # of the features' deviation, so that no two items are equal


def fill(
    folder: Path,
    embedder: Embedder,
    crops: Sequence[Path],
    count: int,
    database_url: str | None = None,
) -> None:
    """Enroll the crops, as often as they are needed, each time with a little noise."""
    pictures = decoded(crops)
    y = embedder.embed(pictures)
    noise = _NOISE * y.std()
    opened = Gallery.open(folder, embedder.info, device=embedder.device, database_url=database_url)
    with closing(opened) as gallery:
        for start in range(0, count, _BLOCK):
            places = [i % len(pictures) for i in range(start, min(start + _BLOCK, count))]
            new = [NewItem(pictures[i], person_id=f"person-{i}") for i in places]
            gallery.add(new, y[places] + noise * torch.randn(len(places), *y.shape[1:]))
        gallery.save_index()
