"""The service's features and recall index over one gallery: what benchmarks know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import Modulation, lift, project
from service.gallery.index import RecallIndex
from service.gallery.rescoring import Features

_BLOCK = 16_384
_SLACK = 64  # rows that an exhaustive search recomputes beside those asked for, as the service does
_TRAINING_PER_LIST = 40  # FAISS's own advice is 39 at least
GRAPH_LIMIT = 100_000  # building HNSW over more takes hours on two cores

Positions = npt.NDArray[np.int64]
# A projected query and the shortlist's length → positions, nearest first.
Recall = Callable[[npt.NDArray[np.float32], int], Positions]


class Index(NamedTuple):
    """A recall index under one setting ("" if it has none).

    nested: a shorter shortlist is the beginning of a longer one.
    """

    kind: str
    setting: str
    search: Recall
    nested: bool


class Engine:
    """N×P×D fp16 features as the service keeps them."""

    def __init__(self, gallery: Tensor, device: str = "cpu") -> None:
        self.count, self.parts, self.dim = gallery.shape
        self._features = Features(self.parts, self.dim, "euclidean", device)
        for start in range(0, self.count, _BLOCK):
            self._features.add(gallery[start : start + _BLOCK].flatten(1).numpy())

    def exhaustive(self, x: Tensor, modulation: Modulation, top: int) -> list[Positions]:
        """Queries x (Q×P×D) → each one's `top` nearest by the exact distance, best first."""
        found = []
        for q in range(len(x)):
            one = Modulation(*(p[q : q + 1] for p in modulation))
            scores = self._features.score_all(x[q], one)
            few = min(top + _SLACK, self.count)
            near = np.argpartition(scores, few - 1)[:few].astype(np.int64)
            found.append(self.rescored(x[q : q + 1], one, near, top))
        return found

    def two_stage(
        self, x: Tensor, modulation: Modulation, recall: Recall, length: int, top: int
    ) -> Positions:
        """One query (1×P×D): a shortlist, rescored exactly → its `top` nearest, best first."""
        w, _ = project(x, modulation)
        return self.rescored(x, modulation, recall(w[0].numpy(), length), top)

    def rescored(self, x: Tensor, modulation: Modulation, found: Positions, top: int) -> Positions:
        """The `top` nearest to one query (1×P×D) of the rows at `found`."""
        distances, _ = self._features.rescore(x[0], modulation, found)
        return found[np.argsort(distances, kind="stable")[:top]]

    def service_index(self) -> Index:
        """The index that the service builds over these features."""
        ours = RecallIndex((self.parts + 1) * self.dim)
        for lifted in self._lifted():
            ours.add(lifted)
        search = partial(ours.search, allowed=np.ones(self.count, np.bool_))
        return Index("flat (the service's)", "", search, nested=True)

    def indexes(self) -> Iterator[Index]:
        """The service's index, then others of FAISS, one in memory at a time."""
        yield self.service_index()
        lists = max(1, round(2 * self.count**0.5))
        kinds: list[tuple[str, str, list[int]]] = [
            ("SQfp16", "", [0]),
            ("SQ8", "", [0]),
            (f"IVF{lists},SQ8", "nprobe", [16, 64, 256]),
        ]
        if self.count <= GRAPH_LIMIT:
            kinds.append(("HNSW32", "efSearch", [64, 256]))
        for kind, parameter, values in kinds:
            index = self._faiss(kind, lists)
            for value in values:
                if parameter:
                    faiss.ParameterSpace().set_index_parameter(index, parameter, value)
                setting = f"{parameter} {value}" if parameter else ""
                yield Index(kind, setting, partial(_search, index), not kind.startswith("HNSW"))

    def _faiss(self, factory: str, lists: int) -> Any:
        index = faiss.index_factory(
            (self.parts + 1) * self.dim, factory, faiss.METRIC_INNER_PRODUCT
        )
        wanted = min(self.count, _TRAINING_PER_LIST * lists)
        chosen = np.random.default_rng(0).choice(self.count, wanted, replace=False)
        index.train(self._lift(np.sort(chosen)))
        for lifted in self._lifted():
            index.add(lifted)
        return index

    def _lifted(self) -> Iterator[npt.NDArray[np.float32]]:
        for start in range(0, self.count, _BLOCK):
            yield self._lift(np.arange(start, min(start + _BLOCK, self.count)))

    def _lift(self, positions: Positions) -> npt.NDArray[np.float32]:
        y = torch.from_numpy(self._features.stored(positions))
        lifted: npt.NDArray[np.float32] = lift(y.view(-1, self.parts, self.dim)).numpy()
        return lifted


def _search(index: Any, w: npt.NDArray[np.float32], length: int) -> Positions:
    found: Positions = index.search(w[None], length)[1][0]
    return found[found >= 0]
