"""The recall stage's FAISS indexes: inner products over lifted vectors, removal left to a mask.

With z(y) = `model.lift` and w(x) = `model.project`, D²(x, y) = c(x) − ⟨w(x), z(y)⟩, so that the
largest inner products are the smallest *modulated* distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import numpy.typing as npt

from service.gallery.index.chunks import selecting
from service.gallery.index.faiss_module import faiss
from service.gallery.index.figures import Figures
from service.gallery.records import IndexKind
from service.kit.shared_lock import SharedLock


def is_gpu_kind(kind: IndexKind) -> bool:
    """Whether an index of this kind lies on a GPU, see `gpu_index`."""
    return kind.startswith("GPU-")


KINDS: tuple[IndexKind, ...] = tuple(k for k in get_args(IndexKind) if not is_gpu_kind(k))
GPU_KINDS: tuple[IndexKind, ...] = tuple(k for k in get_args(IndexKind) if is_gpu_kind(k))

# From this many items on, a CPU uses an inverted file; below, it scans all rows.
IVF_FROM = 200_000
# An index takes at most this share of the free memory.
MEMORY_SHARE = 0.5
NPROBE_SHARE = 0.1  # of all lists
TRAINING_PER_LIST = 40  # FAISS's own advice is 39 at least
_GRAPH_LINKS = 32
_CAGRA_LINKS = 64  # FAISS's own choice
_EF_SEARCH = 2  # times the shortlist's length
_PQ_NUMBERS = 8  # per byte of a code


def choose_kind(
    count: int,
    device: str,
    free_bytes: Callable[[], int],
    width: int,
    figures: Figures | None = None,
) -> IndexKind:
    """The index for `count` lifted vectors of `width` numbers.

    free_bytes: how much memory is left; asked only where it matters, since it takes milliseconds.

    Milliseconds a query and recall@10 with a shortlist of 200, on two cores of an Intel Xeon (AMX),
    P·D = 768, features sampled like rendered crops (`cmt bench recall`, results/recall.json):

        kind             N = 100,000      200,000          1,000,000        bytes per item beside
                         ms     recall    ms     recall    ms     recall    the features
        SQfp16           13.0   1.00      25.3   1.00      103    1.00      0
        Flat             29.1   1.00      55.3   1.00      257    1.00      3,584
        SQ8              17.6   1.00      31.6   1.00      153    1.00      896
        IVF-Flat, 10%    4.2    0.978     7.5    1.00      29.0   0.998     3,592
        IVF-SQ8, 10%     3.2    0.978     4.7    1.00      18.3   0.998     904 (of its lists
        IVF-PQ, 10%      2.1    0.802     2.7    0.668     6.9    0.538     120  searched)
        HNSW             2.7    0.988                                       3,856

    So the scan of what is in memory anyway serves as long as it takes some 25 ms, and an inverted
    file where it finds as much.

    On a GPU by `figures` of its own (`cmt bench recall --device cuda`): the fastest kind that finds
    nearly all at the nearest size, if that is near enough. Without figures all rows are multiplied,
    which finds all of them and reads a gallery at the speed of the memory: no index of FAISS was
    measured on a GPU by us.
    """
    if device != "cpu":
        kind = figures.fastest(count) if figures is not None else "SQfp16"
    else:
        kind = "SQfp16" if count < IVF_FROM else "IVF-SQ8"
    size = index_bytes(kind, count, width)
    return kind if not size or size <= MEMORY_SHARE * free_bytes() else "SQfp16"


def index_bytes(kind: IndexKind, count: int, width: int) -> int:
    """Approximate memory of an index in bytes, in addition to the features'."""
    per_item = {
        "SQfp16": 0,
        "Flat": 4 * width,
        "SQ8": width,
        "IVF-Flat": 4 * width + 8,
        "IVF-SQ8": width + 8,
        "IVF-PQ": width // _PQ_NUMBERS + 8,
        "HNSW": 4 * width + 8 * _GRAPH_LINKS + 16,
        "GPU-Flat": 2 * width,
        "GPU-IVF-SQ8": width + 8,
        "GPU-CAGRA": 4 * width + 4 * _CAGRA_LINKS,
    }[kind]
    lists = 4 * width * _lists(count) if "IVF" in kind else 0
    return count * per_item + lists


def training_rows(kind: IndexKind, count: int) -> int:
    """How many of `count` vectors an index of this kind is trained on."""
    if kind == "GPU-CAGRA":
        return count  # its graph is made of all rows at once
    if "IVF" in kind:
        least = TRAINING_PER_LIST * 256 if kind == "IVF-PQ" else 0  # a code has 256 values
        return min(count, max(least, TRAINING_PER_LIST * _lists(count)))
    return min(count, 20_000) if kind == "SQ8" else 0


class RecallIndex:
    """Positions 0…N−1 in order of addition. Thread-safe: an `add` waits for searches.

    kind "SQfp16" is what a `Chunk` is made of; the service scans its chunks and builds none. count:
    how many vectors are expected, which sets the number of an inverted file's lists. extendable:
    whether it takes vectors after its first ones.
    """

    def __init__(self, size: int, kind: IndexKind = "Flat", count: int = 0) -> None:
        self._prepare(kind, count)
        self._faiss = faiss.index_factory(
            size, _factory(kind, size, self.lists), faiss.METRIC_INNER_PRODUCT
        )
        self._lock = SharedLock()

    def _prepare(self, kind: IndexKind, count: int) -> None:
        self.kind, self.expected, self.extendable = kind, count, True
        self.lists = _lists(count) if "IVF" in kind else 0
        self.nprobe = max(1, math.ceil(NPROBE_SHARE * self.lists))

    @classmethod
    def read(cls, path: str, size: int, kind: IndexKind, count: int) -> RecallIndex:
        """Read what `write` wrote for the same arguments.

        FAISS may crash on a damaged file: the caller checks it first.
        """
        index = cls(size, kind, count)
        index._faiss = faiss.read_index(path)
        return index

    def __len__(self) -> int:
        return int(self._faiss.ntotal)

    def write(self, path: str) -> int:
        """Write the index to a file → how many vectors it has. Raises RuntimeError (FAISS's)."""
        with self._lock.shared():
            faiss.write_index(self._faiss, path)
            count: int = self._faiss.ntotal
            return count

    def train(self, lifted: npt.NDArray[np.float32]) -> None:
        """Learn lists and codes from a sample, where the kind has any. Before the first `add`."""
        if not self._faiss.is_trained:
            self._faiss.train(np.ascontiguousarray(lifted))

    def add(self, lifted: npt.NDArray[np.float32]) -> None:
        """Append vectors. lifted: N×(P+1)D, as `model.lift` gives it."""
        with self._lock.alone():
            self._faiss.add(np.ascontiguousarray(lifted))

    def search(
        self, projected: npt.NDArray[np.float32], count: int, allowed: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """The best positions for one projected query ((P+1)D numbers), nearest first.

        allowed: one flag per position; the others are skipped *before* the shortlist is made.
        Fewer than `count` come back where fewer are allowed, and from inverted files and graphs
        where the parts that are searched hold fewer.
        """
        positions: npt.NDArray[np.int64] = self.search_batch(projected[None], count, allowed)[1][0]
        return positions[positions >= 0]

    def search_batch(
        self, projected: npt.NDArray[np.float32], count: int, allowed: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Q queries under one mask → scores and positions, Q×count; −1 where there are no more."""
        count = min(count, int(np.count_nonzero(allowed)))
        if count == 0:
            empty = np.empty((len(projected), 0))
            return empty.astype(np.float32), empty.astype(np.int64)
        # A selector also where all are allowed: FAISS's flat index would multiply by BLAS
        # otherwise, and round a query in a batch unlike the same one alone.
        if self.lists:
            parameters = selecting(allowed, faiss.SearchParametersIVF, nprobe=self.nprobe)
        elif self.kind == "HNSW":
            breadth = _EF_SEARCH * count
            parameters = selecting(allowed, faiss.SearchParametersHNSW, efSearch=breadth)
        else:
            parameters = selecting(allowed)
        with self._lock.shared():
            scores, positions = self._faiss.search(projected, count, params=parameters)
        return scores, positions


def _lists(count: int) -> int:
    """Twice the root of `count`, but few enough that every list can be trained."""
    return max(1, min(round(2 * math.sqrt(count)), count // TRAINING_PER_LIST))


def _factory(kind: IndexKind, size: int, lists: int) -> str:
    """FAISS's name of the index."""
    if kind == "IVF-PQ":
        # A code needs a divisor of the vector's length. "np": without polysemous training, which
        # takes minutes and serves a kind of search that we do not use.
        numbers = next(n for n in (_PQ_NUMBERS, 4, 2, 1) if size % n == 0)
        return f"IVF{lists},PQ{size // numbers}x8np"
    return {
        "SQfp16": "SQfp16",
        "Flat": "Flat",
        "SQ8": "SQ8",
        "IVF-Flat": f"IVF{lists},Flat",
        "IVF-SQ8": f"IVF{lists},SQ8",
        "HNSW": f"HNSW{_GRAPH_LINKS}",
    }[kind]
