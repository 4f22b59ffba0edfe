"""The service's search over one gallery of features, as benchmarks use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model import CMTConfig, Modulation, project
from service.bench.crops import BenchmarkDataError
from service.gallery.feed import Stored
from service.gallery.index.byte_codes import levels
from service.gallery.index.exact_topk import first_rows, nearest_of
from service.gallery.index.features import Features, Measured
from service.gallery.index.gpu_index import obstacles
from service.gallery.index.inner_products import Best, exhaustive
from service.gallery.index.maintenance import INDEX_LEAST
from service.gallery.index.recall import recall
from service.gallery.index.recall_index import (
    KINDS,
    NPROBE_SHARE,
    RecallIndex,
    index_bytes,
)
from service.gallery.index.segment import Segment, build_index, extend_codes
from service.gallery.records import IndexKind

_BLOCK = 16_384
_NPROBE_SHARES = (0.05, NPROBE_SHARE, 0.2)  # of all lists
GRAPH_LIMIT = 100_000  # building HNSW over more rows takes hours on two cores

Positions = npt.NDArray[np.int64]
# A projected query and the shortlist's length → positions, nearest first.
Recall = Callable[[Tensor, int], Positions]


class Index(NamedTuple):
    """A recall index under one setting ("" if it has none).

    bytes_per_item: beside the features. nested: a shorter shortlist is the beginning of a longer
    one. Not so where the probed lists may hold too few for the longer one, which is then found by a
    scan of all rows, and where codes find more rows than are kept, in no order.
    """

    kind: str
    setting: str
    search: Recall
    bytes_per_item: float
    nested: bool


class Engine:
    """N×P×D fp16 features as the service keeps them."""

    def __init__(self, gallery: Tensor, device: str = "cpu") -> None:
        self.count, self.parts, self.dim = gallery.shape
        config = CMTConfig(parts=self.parts, dim=self.dim, input_height=96 * self.parts)
        self._segment = Segment.empty(config, device)
        for start in range(0, self.count, _BLOCK):
            self._segment.add(_unlabelled(gallery[start : start + _BLOCK], start))
        if device == "cpu" and levels(self.width):
            extend_codes(self._features, self.count, lambda: False)
        self._all = np.ones(self.count, np.bool_)

    @property
    def _features(self) -> Features:
        return self._segment.features

    @property
    def width(self) -> int:
        """Numbers of a lifted vector."""
        return self._features.width

    def exhaustive(self, x: Tensor, modulation: Modulation, top: int) -> list[Positions]:
        """Queries x (Q×P×D) → each one's `top` nearest of all, proven, best first."""
        x, modulation = x.double(), Modulation(*(p.double() for p in modulation))
        w, c = project(x, modulation)
        everything = [self._all] * len(x)
        best, exact = exhaustive(self._features, w, top, everything, exact=False)
        features, first = self._features, None
        if features.device.type != "cpu":  # as `Searcher` does
            taken = [first_rows(features, w[q], b, top, exact=exact) for q, b in enumerate(best)]
            first = features.rescore_together(
                [(x[q], _one(modulation, q), b.positions) for q, b in enumerate(taken)]
            )
        return [
            self._nearest(
                *(x[q], _one(modulation, q), (w[q], float(c[q])), one, top, exact),
                None if first is None else first[q],
            )
            for q, one in enumerate(best)
        ]

    def exhaustive_without_codes(
        self, x: Tensor, modulation: Modulation, top: int
    ) -> list[Positions]:
        """As `exhaustive`, of the fp16 features alone."""
        codes, self._features.codes = self._features.codes, None
        try:
            return self.exhaustive(x, modulation, top)
        finally:
            self._features.codes = codes

    def possible(self, x: Tensor, modulation: Modulation, top: int) -> float | None:
        """The share of rows that the codes leave to be scored, of all queries.

        None where they are not read first for so many queries.
        """
        w, _ = project(x.double(), Modulation(*(p.double() for p in modulation)))
        best, _ = exhaustive(self._features, w, top, [self._all] * len(x), exact=False)
        if not all(one.complete for one in best):
            return None
        return sum(len(one.positions) for one in best) / len(best) / self.count

    def scored(self, x: Tensor, modulation: Modulation, top: int) -> list[Positions]:
        """As `exhaustive`, but by the closed form alone, with the rounding error of its product."""
        x, modulation = x.double(), Modulation(*(p.double() for p in modulation))
        w, _ = project(x, modulation)
        best, _ = exhaustive(self._features, w, top, [self._all] * len(x), exact=False)
        return [one.first(top).positions for one in best]

    def _nearest(
        self,
        x: Tensor,
        modulation: Modulation,
        projected: tuple[Tensor, float],
        best: Best,
        top: int,
        exact: bool,
        first: Measured | None,
    ) -> Positions:
        nearest = nearest_of(
            *(self._features, x, modulation, projected, best),
            searched=self.count,
            count=top,
            exact=exact,
            first=first,
        )
        if not nearest.proven:
            raise BenchmarkDataError("rounding hides the nearest of these features")
        order = np.argsort(nearest.distances, kind="stable")[:top]
        return nearest.best.positions[order]

    def two_stage(
        self, x: Tensor, modulation: Modulation, search: Recall, length: int, top: int
    ) -> Positions:
        """One query (1×P×D): a shortlist, rescored exactly → its `top` nearest, best first."""
        w, _ = project(x.double(), Modulation(*(p.double() for p in modulation)))
        return self.rescored(x, modulation, search(w[0], length), top)

    def rescored(self, x: Tensor, modulation: Modulation, found: Positions, top: int) -> Positions:
        """The `top` nearest to one query (1×P×D) of the rows at `found`."""
        distances, _ = self._features.rescore(x[0], modulation, found)
        return found[np.argsort(distances, kind="stable")[:top]]

    def index(self, kind: IndexKind) -> RecallIndex | None:
        """An index as the service builds it; None for the scan of the features themselves."""
        if kind == "SQfp16":
            return None
        return build_index(self._segment, kind, lambda: False)

    def searching(self, index: RecallIndex | None) -> Recall:
        """The service's first stage with this index."""

        def search(w: Tensor, length: int) -> Positions:
            return recall(self._features, index, w[None], length, [self._all])[0].positions

        return search

    def indexes(self) -> Iterator[Index]:
        """Every kind of this device that can be built here, one in memory at a time.

        The scan first, on a GPU the product of all rows.
        """
        device = self._features.device.type
        kinds = KINDS
        if device != "cpu":
            kinds = ("SQfp16", *(kind for kind, why in obstacles(device).items() if why is None))
        for kind in kinds:
            if kind != "SQfp16" and self.count < INDEX_LEAST:
                continue
            if kind == "HNSW" and self.count > GRAPH_LIMIT:
                continue
            index = self.index(kind)
            search = self.searching(index)
            size = index_bytes(kind, self.count, self.width) / self.count
            if index is None or not index.lists:
                by_codes = index is None and self._features.codes is not None
                nested = kind not in ("HNSW", "GPU-CAGRA") and not by_codes
                yield Index(kind, "", search, size, nested=nested)
                continue
            for share in _NPROBE_SHARES:
                index.nprobe = max(1, round(share * index.lists))
                yield Index(kind, f"{share:.0%} of lists", search, size, nested=False)


def _unlabelled(features: Tensor, first: int) -> Stored:
    count = len(features)
    return Stored(
        numbers=list(range(first + 1, first + count + 1)),
        persons=[None] * count,
        cameras=[None] * count,
        modalities=["rgb"] * count,
        captured=[None] * count,
        features=features.flatten(1).numpy(),
    )


def _one(modulation: Modulation, q: int) -> Modulation:
    return Modulation(*(parameter[q : q + 1] for parameter in modulation))
