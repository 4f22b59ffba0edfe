"""The recall stage's indexes on a GPU: FAISS's own copies of the rows, coarser and sooner searched.

What FAISS can do there, and what follows from it:

- It returns 2,048 rows at most. Whoever wants more, or few of what a filter leaves, is not answered
  here: all rows are multiplied instead, see `recall`.
- Only builds with cuVS skip rows by a selector, so more rows than wanted are fetched and those that
  a mask bars are dropped.
- Indexes and `StandardGpuResources` may be used by one thread at a time: every index has resources
  of its own, and a lock. An index that is being built does not keep the other one waiting.
- `GpuIndexFlat` copies the rows, although the features lie beside it in the same fp16. `bfKnn`
  would read them in place, but takes queries of their precision, no mask, and a call per chunk:
  what the product of all rows does with more digits and masks, at the speed of the memory.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.device import DeviceError
from service.gallery.index.chunks import scale_for
from service.gallery.index.faiss_module import faiss, version
from service.gallery.index.recall_index import GPU_KINDS, RecallIndex, is_gpu_kind
from service.gallery.records import IndexKind
from service.kit.memory import is_out_of_memory

MOST_FETCHED = 2048  # rows, and lists that are probed
_CAGRA_FETCHED = 512  # rows; also the breadth of its search, which one block of threads holds
# Bytes that FAISS takes of a GPU, and of pinned memory, for an index; its own choice is 1.5 GiB.
_TEMPORARY, _PINNED = 256 << 20, 64 << 20
_SPARE = 1.25  # more rows are fetched than a mask would leave on average, this many times as many
_LARGEST = 65_504.0  # of fp16
_CLASSES = {
    "GPU-Flat": "GpuIndexFlatIP",
    "GPU-IVF-SQ8": "GpuIndexIVFScalarQuantizer",
    "GPU-CAGRA": "GpuIndexCagra",
}


class IndexKindError(DeviceError):
    """A kind of index that cannot be built here; the message says what to do."""


def check_kind(kind: IndexKind, device: str) -> None:
    """Raises IndexKindError for a kind that needs a GPU, or a build of FAISS, that is not there."""
    if not is_gpu_kind(kind):
        return
    if torch.device(device).type == "cpu":
        raise IndexKindError(
            f"the index {kind} needs a GPU, and this gallery is on the CPU; choose another kind"
        )
    if version() is None or not hasattr(faiss, "StandardGpuResources"):
        found = "none is installed" if version() is None else f"faiss {version()} is built without"
        raise IndexKindError(
            f"the index {kind} needs FAISS for GPUs, and {found}; install the extra gpu in place "
            "of the extra cpu, or choose another kind"
        )
    if not hasattr(faiss, _CLASSES[kind]):
        raise IndexKindError(
            f"the index {kind} needs FAISS with cuVS, and faiss {version()} is built without; "
            "install faiss-gpu-cuvs, or choose another kind"
        )


def obstacles(device: str) -> dict[IndexKind, str | None]:
    """Every kind on a GPU: None if it can be built here, else why not."""
    found: dict[IndexKind, str | None] = dict.fromkeys(GPU_KINDS)
    for kind in GPU_KINDS:
        try:
            check_kind(kind, device)
        except IndexKindError as error:
            found[kind] = str(error)
    return found


class GpuIndex(RecallIndex):
    """A `RecallIndex` on a GPU; a search waits for another one.

    Vectors and queries are kept in fp16's range by powers of two. `extendable`: CAGRA takes all of
    its rows at once.
    """

    def __init__(
        self, size: int, kind: IndexKind, count: int, device: torch.device, dim: int
    ) -> None:
        """dim: how many numbers s has, at the end of a vector. Raises IndexKindError."""
        check_kind(kind, str(device))
        self._prepare(kind, count)
        self._dim, self._scale = dim, 0.0
        self.extendable = kind != "GPU-CAGRA"
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(_TEMPORARY)
        self._resources.setPinnedMemory(_PINNED)
        self._using = threading.Lock()
        self._faiss = self._made(size, device.index or 0)

    def _made(self, size: int, number: int) -> Any:
        metric = faiss.METRIC_INNER_PRODUCT
        if self.kind == "GPU-Flat":
            config = faiss.GpuIndexFlatConfig()
            config.device, config.useFloat16 = number, True
            return faiss.GpuIndexFlatIP(self._resources, size, config)
        if self.kind == "GPU-CAGRA":
            config = faiss.GpuIndexCagraConfig()
            config.device = number
            return faiss.GpuIndexCagra(self._resources, size, metric, config)
        config = faiss.GpuIndexIVFScalarQuantizerConfig()
        config.device = number
        code = faiss.ScalarQuantizer.QT_8bit
        make = faiss.GpuIndexIVFScalarQuantizer
        return make(self._resources, size, self.lists, code, metric, True, config)

    def train(self, lifted: npt.NDArray[np.float32]) -> None:
        """As on a CPU; CAGRA is given all of its rows here."""
        with self._using:
            if not self._faiss.is_trained:
                self._faiss.train(self._scaled(lifted))

    def add(self, lifted: npt.NDArray[np.float32]) -> None:
        """Append vectors. lifted: N×(P+1)D, as `model.lift` gives it."""
        with self._using:
            self._faiss.add(self._scaled(lifted))

    def search_batch(
        self, projected: npt.NDArray[np.float32], count: int, allowed: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """As on a CPU, but fewer rows than asked for, or none, where FAISS cannot fetch enough.

        Nor where it has no memory.
        """
        total = int(np.count_nonzero(allowed))
        count = min(count, total)
        fetched = self._to_fetch(count, total)
        if count == 0 or fetched > (_CAGRA_FETCHED if self.kind == "GPU-CAGRA" else MOST_FETCHED):
            return _nothing(len(projected), count)
        queries = projected.copy()
        queries[:, -self._dim :] /= self._scale
        sizes = np.exp2(np.ceil(np.log2(np.abs(queries).max(1, keepdims=True).clip(1e-30))))
        queries = np.ascontiguousarray(queries / sizes, np.float32)
        try:
            with self._using:
                self._probe()
                found = self._faiss.search(queries, fetched, params=self._given(fetched))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return _nothing(len(projected), count)
        scores, positions = found
        real = (positions >= 0) & (positions < len(allowed))
        real &= allowed[np.where(real, positions, 0)]
        first = np.argsort(~real, axis=1, kind="stable")[:, :count]
        scores, positions, real = (
            np.take_along_axis(of, first, 1) for of in (scores, positions, real)
        )
        scores = np.where(real, scores, -np.inf) * sizes
        return scores.astype(np.float32), np.where(real, positions, -1).astype(np.int64)

    def _to_fetch(self, count: int, total: int) -> int:
        """So many rows that `count` of them are allowed, if these lie among the others evenly."""
        if total == len(self):
            return count
        return int(min(len(self), _SPARE * count * len(self) / max(1, total) + 32))

    def _probe(self) -> None:
        if self.lists:
            self._faiss.nprobe = min(self.nprobe, MOST_FETCHED)

    def _given(self, fetched: int) -> Any:
        if self.kind != "GPU-CAGRA":
            return None
        parameters = faiss.SearchParametersCagra()
        # The breadth of the search, in warps' shares of 32.
        parameters.itopk_size = min(_CAGRA_FETCHED, -(-max(64, 2 * fetched) // 32) * 32)
        return parameters

    def _scaled(self, lifted: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Vectors whose s lies in fp16's range, by the first of them. Call with `_using` held."""
        vectors = np.array(lifted, np.float32, order="C")
        s = vectors[:, -self._dim :]
        self._scale = self._scale or scale_for(float(s.max(initial=0)))
        # A later s may be larger than can be: its row is then found sooner than it should be.
        np.minimum(s * self._scale, _LARGEST, out=s)
        return vectors


def _nothing(queries: int, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    positions = np.full((queries, count), -1, np.int64)
    return np.full(positions.shape, -np.inf, np.float32), positions


def make_index(
    size: int, kind: IndexKind, count: int, device: torch.device, dim: int
) -> RecallIndex:
    """An empty index of any kind. device: that of the features. Raises IndexKindError."""
    if is_gpu_kind(kind):
        return GpuIndex(size, kind, count, device, dim)
    return RecallIndex(size, kind, count)
