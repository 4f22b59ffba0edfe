"""The features on the device: their memory, and exact modulated distances of a few of them.

Items are ranked by y as it is stored (fp16). The lifted vectors of `chunks` hold it unchanged,
beside s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import (
    Modulation,
    lift,
    modulated_cosine_distance,
    part_distances,
    project,
)
from model.config import Metric
from service.gallery.index.chunks import Chunk, scale_for

# Rows that are widened at once: on a CPU they should stay in its caches.
BLOCK_ROWS = {"cpu": 256, "cuda": 65_536}
# Rows that are collected from their chunks at once; for fewer, finding their chunks costs most.
_GATHER_ROWS = 65_536
_NORM_MARGIN = 1 + 2.0**-10
_SERIAL_NUMBERS = 32_767  # torch shares out element-wise work of more numbers than this


class Norms(NamedTuple):
    """Upper bounds over all rows: ‖y‖, ‖s‖, and the error of s in fp16, ‖s̃ − s‖."""

    y: float = 0.0
    s: float = 0.0
    s_error: float = 0.0


class Features:
    """N×P×D features on `device`, growing at the end. metric: the checkpoint's.

    One thread adds at a time; others may read the rows that were there before. (P+1)·D·2 bytes per
    item.
    """

    def __init__(self, parts: int, dim: int, metric: Metric, device: str) -> None:
        self.parts, self.dim, self.metric = parts, dim, metric
        self.device = torch.device(device)
        self.chunks: tuple[Chunk, ...] = ()
        self.norms = Norms()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def width(self) -> int:
        """(P+1)·D, the length of a lifted vector."""
        return (self.parts + 1) * self.dim

    @property
    def bytes(self) -> int:
        """Memory held, unused rows of the last chunk included."""
        return sum(chunk.z.nbytes for chunk in self.chunks)

    def add(self, rows: npt.NDArray[np.float16]) -> None:
        """Append N×(P·D) rows."""
        y = torch.from_numpy(np.ascontiguousarray(rows))
        s = torch.empty(len(y), self.dim)
        step = self._rows_at_once()
        blocks = (torch.split(rows, step) for rows in (y, s))
        for block, place in zip(*blocks, strict=True):
            place.copy_(lift(block.view(-1, self.parts, self.dim))[:, self.parts * self.dim :])
        start = 0
        while start < len(y):
            chunk = self._open(float(s[start:].max()))
            end = min(len(y), start + chunk.capacity - chunk.count)
            for at in range(start, end, step):
                rows_of = slice(at, min(at + step, end))
                self._note(s[rows_of], chunk.scale)
                chunk.append(y[rows_of].to(self.device), s[rows_of].to(self.device))
            self._count += end - start
            start = end

    def truncate(self, count: int) -> None:
        """Drop the rows from position `count` on, which nobody has read."""
        self.chunks = tuple(chunk for chunk in self.chunks if chunk.first < count)
        for chunk in self.chunks:
            chunk.count = min(chunk.count, count - chunk.first)
        self._count = count

    def adopt(self, chunks: Sequence[Chunk], norms: Norms) -> None:
        """Put filled chunks, read from a snapshot, into empty features."""
        for chunk in chunks:
            chunk.first, self._count = self._count, self._count + chunk.count
        self.chunks, self.norms = tuple(chunks), norms

    def new_chunk(self, scale: float) -> Chunk:
        """An empty chunk of this shape, for `adopt`."""
        return Chunk(0, self.width, scale, self.device)

    def stored(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """The rows at these positions, which ascend: N×(P·D)."""
        rows: npt.NDArray[np.float16] = self._gather(positions).cpu().numpy()
        return rows

    def lifted(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Lifted vectors of the rows at these positions, which ascend: N×(P+1)D, fp32, unscaled."""
        y = self._gather(positions).cpu().reshape(-1, self.parts, self.dim)
        vectors: npt.NDArray[np.float32] = lift(y).numpy()
        return vectors

    @torch.inference_mode()
    def rescore(
        self, x: Tensor, modulation: Modulation, positions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32] | None]:
        """Exact distances of one query (P×D) to the rows at `positions`: N, and parts N×P.

        In float64. Euclidean: computed directly, so that nothing cancels; the parts are squared
        and sum to distance². Cosine: 1 − cosine, where parts have no meaning (None).
        """
        x = x.to(self.device)[None].double()
        modulation = Modulation(*(p.to(self.device).double() for p in modulation))
        order = np.argsort(positions)
        back = np.argsort(order)
        blocks = self._gathered(positions[order])
        step = self._rows_at_once()
        if self.metric == "cosine":
            cosines = [
                modulated_cosine_distance(x, rows.float().double(), modulation)[0]
                for y in blocks
                for rows in torch.split(y, step)
            ]
            return _joined(cosines, (0,))[back], None
        found = [part_distances(x, y, modulation, block=step)[0] for y in blocks]
        parts = _joined(found, (0, self.parts))[back]
        return np.sqrt(parts.sum(1)), parts.astype(np.float32)

    @torch.inference_mode()
    def distances(
        self, x: Tensor, modulation: Modulation, positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Q queries (Q×P×D) to the rows at `positions`, which ascend: Euclidean, Q×N.

        Good to 1e-6 of the largest; `rescore` gives what is shown. Rows are read once, and every
        query is computed by itself, on the calling thread: a batch changes no digit.
        """
        y = self._gather(positions).cpu().view(-1, self.parts, self.dim)
        z = torch.empty(len(y), self.width)
        step = self._rows_at_once()
        for rows, place in zip(torch.split(y, step), torch.split(z, step), strict=True):
            place.copy_(lift(rows))
        w, c = project(x, modulation)
        products = [np.einsum("nd,d->n", z.numpy(), one) for one in w.float().cpu().numpy()]
        squared = c.double().cpu().numpy()[:, None] - np.stack(products)
        distances: npt.NDArray[np.float64] = np.sqrt(np.maximum(squared, 0))
        return distances

    @torch.inference_mode()
    def between(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Unmodulated distances among the rows at `positions`, in any order: N×N.

        Of some hundreds, on the calling thread.
        """
        order = np.argsort(positions)
        back = np.argsort(order)
        y = self._gather(positions[order]).cpu().numpy()[back].astype(np.float32)
        products = np.vecdot(y[:, None], y).astype(np.float64)
        squares = products.diagonal()
        distances: npt.NDArray[np.float64]
        if self.metric == "cosine":
            norms = np.sqrt(np.maximum(squares, np.finfo(np.float32).tiny))
            distances = 1 - products / norms / norms[:, None]
        else:
            distances = np.sqrt(np.maximum(squares + squares[:, None] - 2 * products, 0))
        return distances

    @torch.inference_mode()
    def score_all(self, x: Tensor, modulation: Modulation) -> npt.NDArray[np.floating]:
        """One query (P×D) against every row: N numbers that rank like the distance.

        Euclidean: D² = c − ⟨w, z⟩ in fp32, whose last digits cancel. Cosine: 1 − cosine in float64.
        `inner_products.exhaustive` is several times as fast where only the best are wanted.
        """
        x = x.to(self.device)[None].double()
        modulation = Modulation(*(p.to(self.device).double() for p in modulation))
        w, c = project(x, modulation)
        cosine = self.metric == "cosine"
        scores = torch.empty(self._count, dtype=torch.float64 if cosine else torch.float32)
        step = BLOCK_ROWS[self.device.type]
        for chunk in self.chunks:
            filled = min(chunk.count, len(scores) - chunk.first)  # more may be added meanwhile
            for start in range(0, filled, step):
                end = min(start + step, filled)
                y = chunk.z[start:end, : self.parts * self.dim].reshape(-1, self.parts, self.dim)
                if cosine:
                    block = modulated_cosine_distance(x, y.double(), modulation)[0]
                else:
                    block = c - lift(y) @ w[0].float()
                scores[chunk.first + start : chunk.first + end] = block
        numbers: npt.NDArray[np.floating] = scores.numpy()
        return numbers

    def _open(self, largest: float) -> Chunk:
        """A chunk that takes rows whose s goes up to `largest`; a new one where needed."""
        if not self.chunks or not self.chunks[-1].takes(largest):
            chunk = Chunk(self._count, self.width, scale_for(largest), self.device)
            self.chunks = (*self.chunks, chunk)
        return self.chunks[-1]

    def _note(self, s: Tensor, scale: float) -> None:
        # The scale is a power of two and the numbers lie close: s̃ − s is exact in fp32.
        kept = (s * scale).half().float() / scale
        # ‖y‖² is the sum of s. fp32 sums of D numbers round by less than the margin.
        found = s.sum(1).sqrt(), s.norm(dim=1), (kept - s).norm(dim=1)
        largest = (float(norms.max()) * _NORM_MARGIN for norms in found)
        self.norms = Norms(*map(max, self.norms, largest))

    def _rows_at_once(self) -> int:
        """How many rows are added, or rescored for one query, at once.

        On a CPU so few that torch stays on the calling thread, and the rows in its caches: it is
        milliseconds of work, and waiting for other threads took 50 on a busy machine.
        """
        if self.device.type != "cpu":
            return BLOCK_ROWS[self.device.type]
        return max(1, _SERIAL_NUMBERS // self.width)

    def _gathered(self, positions: npt.NDArray[np.int64]) -> Iterator[Tensor]:
        """Blocks of y at `positions`, which ascend: B×P×D in fp16."""
        for start in range(0, len(positions), _GATHER_ROWS):
            rows = self._gather(positions[start : start + _GATHER_ROWS])
            yield rows.reshape(-1, self.parts, self.dim)

    def _gather(self, positions: npt.NDArray[np.int64]) -> Tensor:
        """Rows of y in fp16 on the device, N×(P·D), at `positions`, which ascend."""
        rows = torch.empty(len(positions), self.width, dtype=torch.float16, device=self.device)
        chunks = self.chunks
        edges = np.searchsorted(positions, [chunk.first for chunk in chunks]).tolist()
        for chunk, start, end in zip(chunks, edges, [*edges[1:], len(positions)], strict=True):
            local = positions[start:end] - chunk.first
            if start == end:
                continue
            if self.device.type == "cpu":  # on this thread, unlike torch.index_select
                out = rows[start:end].numpy()
                np.take(chunk.z.numpy(), local, axis=0, out=out, mode="clip")
            else:
                places = torch.from_numpy(local).to(self.device)
                torch.index_select(chunk.z, 0, places, out=rows[start:end])
        return rows[:, : self.parts * self.dim]


def _joined(blocks: list[Tensor], empty: tuple[int, ...]) -> npt.NDArray[np.float64]:
    if not blocks:
        return np.empty(empty)
    joined: npt.NDArray[np.float64] = torch.cat(blocks).cpu().numpy()
    return joined
