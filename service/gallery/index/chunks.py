"""Lifted vectors in fp16, in chunks that never move: growth copies nothing, readers need no lock.

A row is z(y) = [y_1; …; y_P; s(y)] as `model.lift` makes it, with s scaled by its chunk's `scale`,
a power of two that brings s into fp16's range. (P+1)·D·2 bytes per item, and at most one chunk
more. On a CPU a chunk is also FAISS's own flat fp16 index, whose codes are our rows: one memory
serves FAISS's scan, the matrix product and rescoring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.gallery.index.faiss_module import faiss
from service.kit.memory import is_out_of_memory

# One flag per row: whether a query may see it.
Mask = npt.NDArray[np.bool_]

# On a CPU a chunk is a thread's share of a scan and should stay in the last cache; on a GPU it is
# one product. Up to one chunk of a gallery's memory may be unused.
CHUNK_ROWS = {"cpu": 8192, "cuda": 65_536}
_LARGEST = 65_504.0  # of fp16
_PAGE = 4096  # of memory; some kernels have larger ones
_HEADROOM = 16  # s of later rows in a chunk may be this many times as large as of its first


def scale_for(largest: float) -> float:
    """A power of two that brings s up to `largest` well into fp16's range."""
    if largest <= 0:
        return 1.0
    return 2.0 ** math.floor(math.log2(_LARGEST / _HEADROOM / largest))


class Chunk:
    """Rows `first` … `first` + capacity − 1 of a gallery; only the first `count` are filled.

    device: where they lie. Chunks of one gallery may lie on a GPU and on the host. capacity: None
    takes the device's own, see `CHUNK_ROWS`. Raises what torch or FAISS does where memory is short.
    """

    def __init__(
        self,
        first: int,
        width: int,
        scale: float,
        device: torch.device,
        capacity: int | None = None,
    ) -> None:
        self.first, self.scale, self.count = first, scale, 0
        self.device = device
        self.capacity = CHUNK_ROWS[device.type] if capacity is None else capacity
        self._scanner: Any = None
        if device.type != "cpu":
            self.z = torch.empty(self.capacity, width, dtype=torch.float16, device=device)
            return
        # NumPy asks the kernel for huge pages: filling it takes a seventh of the faults.
        z = np.empty((self.capacity, width), np.float16)
        self.z = torch.from_numpy(z)
        z.view(np.uint8).reshape(-1)[::_PAGE] = 0  # rows that are promised must not lack it later
        self._scanner = scanner(z, faiss.ScalarQuantizer.QT_fp16)

    @property
    def room(self) -> int:
        """Rows that are not filled."""
        return self.capacity - self.count

    def takes(self, largest: float) -> bool:
        """Whether there is space for another row, and its s up to `largest` fits fp16."""
        return self.room > 0 and largest * self.scale <= _LARGEST

    def append(self, y: Tensor, s: Tensor) -> None:
        """Fill further rows: y N×(P·D) fp16, s N×D fp32 unscaled, both on the host."""
        rows = slice(self.count, self.count + len(y))
        # Whole rows are copied to a device at once, which needs no memory there.
        there = self.device.type != "cpu"
        z = torch.empty(len(y), self.z.shape[1], dtype=torch.float16) if there else self.z[rows]
        z.numpy()[:, : y.shape[1]] = y.numpy()  # which stays on the calling thread
        z[:, y.shape[1] :] = s * self.scale
        if there:
            self.z[rows] = z
        self.count = rows.stop

    def take(self, local: npt.NDArray[np.int64], out: Tensor) -> None:
        """Copy the rows `local`, which ascend, to `out`, N×(P+1)D in fp16 on any device."""
        here, there = self.device.type == "cpu", out.device.type != "cpu"
        if here:  # on this thread, unlike torch.index_select
            rows = torch.empty_like(out, device="cpu") if there else out
            np.take(self.z.numpy(), local, axis=0, out=rows.numpy(), mode="clip")
            if there:
                out.copy_(rows)
            return
        try:
            places = torch.from_numpy(local).to(self.device)
            if there:
                torch.index_select(self.z, 0, places, out=out)
            else:
                out.copy_(self.z.index_select(0, places))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            for place, row in enumerate(local.tolist()):  # which needs no memory on the device
                out[place] = self.z[row]

    def on_host(self, count: int) -> Iterator[Chunk]:
        """Copies of the first `count` rows in the host's memory, piece by piece."""
        for start in range(0, count, CHUNK_ROWS["cpu"]):
            z = self.z[start : min(start + CHUNK_ROWS["cpu"], count)]
            piece = Chunk(self.first + start, z.shape[1], self.scale, torch.device("cpu"), len(z))
            piece.z.copy_(z)
            piece.count = len(z)
            yield piece

    def projected(self, w: Tensor, dim: int) -> Tensor:
        """Q×(P+1)D queries (float64, unscaled) for this chunk's scale, in fp32."""
        scaled = w.numpy().copy()
        scaled[:, -dim:] /= self.scale
        return torch.from_numpy(scaled.astype(np.float32))

    def scan(
        self, w: npt.NDArray[np.float32], count: int, allowed: Any
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Best `count` inner products of each query with the allowed rows, by FAISS, on a CPU.

        w: Q×(P+1)D as `projected` gives it. allowed: what `selecting` gives for flags of its rows.
        → scores and rows of the gallery, Q×count; row −1 where fewer are allowed. Every query is
        computed separately: a batch changes no answer.
        """
        return scanned(self._scanner, self.first, w, count, allowed)


def scanner(codes: npt.NDArray[Any], kind: int) -> Any:
    """FAISS's flat index over rows that it does not own, one code each. kind: of its quantizers.

    All rows count as filled: those that are not are never allowed.
    """
    # The first dimension counts rows, and a code has as many numbers as a vector.
    index = faiss.IndexScalarQuantizer(codes.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    memory = codes.view(np.uint8).reshape(-1)
    index.codes = faiss.MaybeOwnedVectorUInt8.create_view(
        faiss.swig_ptr(memory), memory.size, index.codes.owner
    )
    index.ntotal = len(codes)
    return index


def scanned(
    index: Any, first: int, w: npt.NDArray[np.float32], count: int, allowed: Any
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """`Chunk.scan` of what `scanner` gives; `first`: the place of its first row in the gallery."""
    scores, rows = index.search(w, min(count, index.ntotal), params=allowed)
    return scores, np.where(rows < 0, -1, rows + first)


def selecting(allowed: npt.NDArray[np.bool_], kind: Any = None, **settings: int) -> Any:
    """FAISS's search parameters that let only the allowed rows pass."""
    bits = np.packbits(allowed, bitorder="little")
    return (kind or faiss.SearchParameters)(sel=faiss.IDSelectorBitmap(bits), **settings)
