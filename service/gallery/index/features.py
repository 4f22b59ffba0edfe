"""The features: where they lie, and exact modulated distances of a few of them.

Items are ranked by y as it is stored (fp16). The lifted vectors of `chunks` hold it unchanged,
beside s. What has no room on the device lies on the host, and is found all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from functools import partial
from typing import NamedTuple, TypeAlias, cast

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
from model.modulation import squares
from service.gallery.index.byte_codes import ByteCodes
from service.gallery.index.chunks import CHUNK_ROWS, Chunk, scale_for
from service.gallery.index.faiss_module import one_thread
from service.gallery.index.gpu_products import kernels_on
from service.gallery.index.room import NoRoom, device_room, feature_bytes, host_room, with_less
from service.kit.memory import is_out_of_memory
from service.kit.precedence import give_way

# Rows that are widened at once: on a CPU they should stay in its caches.
BLOCK_ROWS = {"cpu": 256, "cuda": 65_536}
# Rows that are collected from their chunks at once; for fewer, finding their chunks costs most.
_GATHER_ROWS = 65_536
_SCORED_ROWS = 64  # that are widened and scored at once
_WIDENED_NUMBERS = 98_304  # of rows that are widened to float64 at once
_HOST = torch.device("cpu")
_NORM_MARGIN = 1 + 2.0**-10
_COSINE_DIGITS = 12


class Norms(NamedTuple):
    """Upper bounds over all rows: ‖y‖, ‖s‖, and the error of s in fp16, ‖s̃ − s‖."""

    y: float = 0.0
    s: float = 0.0
    s_error: float = 0.0


# Distances of N rows to a query, and parts N×P.
Measured: TypeAlias = "tuple[npt.NDArray[np.float64], npt.NDArray[np.float32] | None]"


class Features:
    """N×P×D features, growing at the end, on `device` or the host. metric: the checkpoint's.

    One thread adds at a time; others may read the rows that were there before. (P+1)·D·2 bytes per
    item.
    """

    def __init__(self, parts: int, dim: int, metric: Metric, device: str) -> None:
        self.parts, self.dim, self.metric = parts, dim, metric
        self.device = torch.device(device)
        self.chunks: tuple[Chunk, ...] = ()
        self.norms = Norms()
        self.codes: ByteCodes | None = None  # of the first rows, once they are made
        self._spare: list[Chunk] = []  # empty, for rows that are going to be added
        self._placing = threading.Lock()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def width(self) -> int:
        """(P+1)·D, the length of a lifted vector."""
        return (self.parts + 1) * self.dim

    @property
    def bytes(self) -> int:
        """Memory held, unused rows of the last chunk and codes included."""
        codes = 0 if self.codes is None else self.codes.bytes
        return codes + sum(chunk.z.nbytes for chunk in (*self.chunks, *self._spare))

    @property
    def device_bytes(self) -> int:
        """Those of them that are not on the host."""
        every = (*self.chunks, *self._spare)
        return sum(chunk.z.nbytes for chunk in every if chunk.device.type != "cpu")

    def make_room(self, count: int) -> None:
        """Take memory for `count` more rows. Raises NoRoom where there is none."""
        room = sum(chunk.room for chunk in (*self.chunks[-1:], *self._spare))
        while room < count:
            chunk = self.new_chunk(1.0)
            self._spare.append(chunk)
            room += chunk.room

    def add(self, rows: npt.NDArray[np.float16]) -> None:
        """Append N×(P·D) rows."""
        y = torch.from_numpy(np.ascontiguousarray(rows))
        s = torch.empty(len(y), self.dim)
        with one_thread():  # what reads the next rows needs the other cores
            blocks = (torch.split(of, BLOCK_ROWS["cpu"]) for of in (y, s))
            for block, place in zip(*blocks, strict=True):
                place.copy_(squares(block.view(-1, self.parts, self.dim)))
            start = 0
            while start < len(y):
                chunk = self._open(float(s[start:].max()))
                rows_of = slice(start, min(len(y), start + chunk.room))
                self._note(s[rows_of], chunk.scale)
                chunk.append(y[rows_of], s[rows_of])
                self._count += rows_of.stop - start
                start = rows_of.stop

    def truncate(self, count: int) -> None:
        """Drop the rows from position `count` on, which nobody has read."""
        self.chunks = tuple(chunk for chunk in self.chunks if chunk.first < count)
        for chunk in self.chunks:
            chunk.count = min(chunk.count, count - chunk.first)
        self._count = count

    def adopt(self, chunks: Sequence[Chunk], norms: Norms) -> None:
        """Put filled chunks into empty features."""
        for chunk in chunks:
            chunk.first, self._count = self._count, self._count + chunk.count
        self.chunks, self.norms = tuple(chunks), norms

    def new_chunk(self, scale: float, rows: int | None = None) -> Chunk:
        """An empty chunk: on the device where it has room, else on the host. Raises NoRoom.

        rows: a chunk for so many at most, None for as many as usual.
        """
        with self._placing:
            chunk = None
            if self.device.type != "cpu":
                chunk = self._chunk_on(self.device, scale, rows)
            chunk = chunk or self._chunk_on(_HOST, scale, rows)
        if chunk is None:
            on_cpu = self.device.type == "cpu"
            nowhere = "this machine has no" if on_cpu else "neither the GPU nor the host has"
            raise NoRoom(f"{nowhere} memory for more features")
        return chunk

    def new_chunk_on_device(self, scale: float, rows: int) -> Chunk | None:
        """An empty chunk for so many rows on the device; None where it has no room."""
        with self._placing:
            return self._chunk_on(self.device, scale, rows)

    def _chunk_on(self, device: torch.device, scale: float, rows: int | None) -> Chunk | None:
        usual = CHUNK_ROWS[device.type]
        capacity = usual if rows is None else min(usual, rows)
        room = host_room() if device.type == "cpu" else device_room(device)
        if room < feature_bytes(capacity, self.width):
            return None
        try:
            return Chunk(0, self.width, scale, device, capacity)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def run_on_host(self) -> slice | None:
        """Chunks on the host that fit together into one on the device, which has room for it."""
        if self.device.type == "cpu":
            return None
        chunks = self.chunks
        on_host = [place for place, chunk in enumerate(chunks) if chunk.device.type == "cpu"]
        if not on_host:
            return None
        first, rows = on_host[0], 0
        stop = first
        most = device_room(self.device) // feature_bytes(1, self.width)
        while (
            stop < len(chunks)
            and chunks[stop].device.type == "cpu"
            and chunks[stop].scale == chunks[first].scale
            and rows + chunks[stop].capacity <= min(most, CHUNK_ROWS[self.device.type])
        ):
            rows += chunks[stop].capacity
            stop += 1
        return slice(first, stop) if rows else None

    def replaced(self, start: int, stop: int, chunks: Sequence[Chunk]) -> Features:
        """The same rows in the same memory, but for `chunks` in place of some."""
        new = Features(self.parts, self.dim, self.metric, str(self.device))
        new._spare = self._spare
        every = (*self.chunks[:start], *chunks, *self.chunks[stop:])
        new.adopt([copy(chunk) for chunk in every], self.norms)
        return new

    def stored(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """The rows at these positions, which ascend: N×(P·D)."""
        rows: npt.NDArray[np.float16] = self._gather(positions, _HOST).numpy()
        return rows

    def lifted(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Lifted vectors of the rows at these positions, which ascend: N×(P+1)D, fp32, unscaled."""
        y = self._gather(positions, _HOST).reshape(-1, self.parts, self.dim)
        vectors: npt.NDArray[np.float32] = lift(y).numpy()
        return vectors

    @torch.inference_mode()
    def rescore(
        self, x: Tensor, modulation: Modulation, positions: npt.NDArray[np.int64]
    ) -> Measured:
        """Exact distances of one query (P×D) to the rows at `positions`: N, and parts N×P.

        In float64. Euclidean: computed directly, so that nothing cancels; the parts are squared
        and sum to distance². Cosine: 1 − cosine, where parts have no meaning (None).
        """
        cosine = self.metric == "cosine"
        measured = np.empty(len(positions) if cosine else (len(positions), self.parts))
        for device, places in self._by_device(positions):
            compute = partial(self._measured, x, modulation, positions[places])
            with one_thread() if device.type == "cpu" else nullcontext():
                measured[places] = with_less(compute, device, self._rows_at_once(device))
        if cosine:
            # The last digits depend on the rows beside: equal items are to be at equal distance.
            return np.round(measured, _COSINE_DIGITS), None
        return np.sqrt(measured.sum(1)), measured.astype(np.float32)

    @torch.inference_mode()
    def rescore_together(
        self, queries: Sequence[tuple[Tensor, Modulation, npt.NDArray[np.int64]]]
    ) -> list[Measured] | None:
        """`rescore` of several queries by one launch; None where that is not possible."""
        kernels = kernels_on(self.device)
        every = np.concatenate([positions for _, _, positions in queries])
        if kernels is None or self.metric == "cosine" or not len(every):
            return None
        if any(device.type == "cpu" for device, _ in self._by_device(every)):
            return None
        chunks, counts = self.chunks, [len(positions) for _, _, positions in queries]

        def compute(device: torch.device, _: int) -> npt.NDArray[np.float64] | None:
            if device.type == "cpu":
                return None
            asked = torch.stack([torch.cat([x, *modulation]) for x, modulation, _ in queries])
            rows = kernels.addresses(chunks, every, np.repeat(np.arange(len(queries)), counts))
            there = torch.from_numpy(rows).to(device)
            parts = kernels.part_distances(there, asked.double().to(device), self.parts)
            return cast("npt.NDArray[np.float64]", parts.cpu().numpy())

        parts = with_less(compute, self.device, 1)
        if parts is None:
            return None
        found = np.split(parts, np.cumsum(counts)[:-1])
        return [(np.sqrt(of.sum(1)), of.astype(np.float32)) for of in found]

    def _measured(
        self,
        x: Tensor,
        modulation: Modulation,
        positions: npt.NDArray[np.int64],
        device: torch.device,
        step: int,
    ) -> npt.NDArray[np.float64]:
        """Distances by part (cosine: whole ones) to some rows, computed on a device."""
        x, modulation = x.double(), Modulation(*(p.double() for p in modulation))
        kernels = kernels_on(device)
        if kernels is not None and self.metric == "euclidean":
            rows = torch.from_numpy(kernels.addresses(self.chunks, positions)).to(device)
            asked = torch.cat([x, *modulation])[None].to(device)
            parts: npt.NDArray[np.float64]
            parts = kernels.part_distances(rows, asked, self.parts).cpu().numpy()
            return parts
        order = np.argsort(positions)
        query, given = x[None].to(device), Modulation(*(p.to(device) for p in modulation))
        cosine = self.metric == "cosine"
        measured = np.empty(len(positions) if cosine else (len(positions), self.parts))
        size = _GATHER_ROWS if device.type == "cpu" else step
        for start in range(0, len(positions), size):
            places = order[start : start + size]
            y = self._gather(positions[places], device).reshape(-1, self.parts, self.dim)
            if cosine:
                blocks = [b.double() for b in torch.split(y, step)]
                found = torch.cat([modulated_cosine_distance(query, b, given)[0] for b in blocks])
            else:
                found = part_distances(query, y, given, block=step)[0]
            measured[places] = found.cpu().numpy()
        return measured

    @torch.inference_mode()
    def lifted_on_host(self, positions: npt.NDArray[np.int64]) -> Tensor:
        """For `lifted_distances`: the rows at `positions`, which ascend, N×(P+1)D in fp32."""
        y = self._gather(positions, _HOST).view(-1, self.parts, self.dim)
        z = torch.empty(len(y), self.width)
        step = self._rows_at_once()
        with one_thread():
            for rows, place in zip(torch.split(y, step), torch.split(z, step), strict=True):
                place.copy_(lift(rows))
        return z

    def scores(self, w: Tensor, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """⟨w, z⟩ of rows on the host at `positions`, which ascend, as a scan computes it.

        w: (P+1)·D float64, unscaled.
        """
        scores = np.empty(len(positions), np.float32)
        queries: dict[float, Tensor] = {}
        with one_thread():
            for chunk, places in self._by_chunk(positions):
                query = queries.get(chunk.scale)
                if query is None:
                    query = queries[chunk.scale] = chunk.projected(w[None], self.dim)[0]
                local, z = positions[places] - chunk.first, chunk.z.numpy()
                for start in range(0, len(local), _SCORED_ROWS):
                    rows = torch.from_numpy(z[local[start : start + _SCORED_ROWS]])
                    at = places.start + start
                    scores[at : at + len(rows)] = (rows.float() @ query).numpy()
        return scores

    @torch.inference_mode()
    def between(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Unmodulated distances among the rows at `positions`, in any order: N×N.

        Of some hundreds, on the calling thread.
        """
        order = np.argsort(positions)
        back = np.argsort(order)
        y = self._gather(positions[order], _HOST).numpy()[back].astype(np.float32)
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
        cosine = self.metric == "cosine"
        scores = torch.empty(self._count, dtype=torch.float64 if cosine else torch.float32)

        def compute(chunk: Chunk, places: Tensor, device: torch.device, step: int) -> None:
            query = x.to(device)[None].double()
            given = Modulation(*(p.to(device).double() for p in modulation))
            w, c = project(query, given)
            for start in range(0, len(places), step):
                give_way()
                end = min(start + step, len(places))
                y = chunk.z[start:end, : self.parts * self.dim].to(device)
                y = y.reshape(-1, self.parts, self.dim)
                if cosine:
                    places[start:end] = modulated_cosine_distance(query, y.double(), given)[0]
                else:
                    # Each row by itself: equal ones get equal numbers, wherever they lie.
                    places[start:end] = c - (lift(y) * w[0].float()).sum(1)

        for chunk in self.chunks:
            filled = min(chunk.count, len(scores) - chunk.first)  # more may be added meanwhile
            if filled > 0:
                places = scores[chunk.first : chunk.first + filled]
                with_less(
                    partial(compute, chunk, places), chunk.device, BLOCK_ROWS[chunk.device.type]
                )
        numbers: npt.NDArray[np.floating] = scores.numpy()
        return numbers

    def _open(self, largest: float) -> Chunk:
        """A chunk that takes rows whose s goes up to `largest`; a new one where needed."""
        if not self.chunks or not self.chunks[-1].takes(largest):
            chunk = self._spare.pop(0) if self._spare else self.new_chunk(1.0)
            chunk.first, chunk.scale = self._count, scale_for(largest)
            self.chunks = (*self.chunks, chunk)
        return self.chunks[-1]

    def _note(self, s: Tensor, scale: float) -> None:
        # The scale is a power of two and the numbers lie close: s̃ − s is exact in fp32.
        kept = (s * scale).half().float() / scale
        # ‖y‖² is the sum of s. fp32 sums of D numbers round by less than the margin.
        found = s.sum(1).sqrt(), s.norm(dim=1), (kept - s).norm(dim=1)
        largest = (float(norms.max()) * _NORM_MARGIN for norms in found)
        self.norms = Norms(*map(max, self.norms, largest))

    def _rows_at_once(self, device: torch.device = _HOST) -> int:
        """How many rows are widened at once: those of one query, or of a sample.

        On a CPU they are computed by one thread and stay in its caches: it is milliseconds of work,
        and waiting for other threads took 50 on a busy machine.
        """
        if device.type != "cpu":
            return BLOCK_ROWS[device.type]
        return max(1, _WIDENED_NUMBERS // self.width)

    def _by_chunk(self, positions: npt.NDArray[np.int64]) -> Iterator[tuple[Chunk, slice]]:
        """The chunks that hold rows at `positions`, which ascend, and where these are in it."""
        chunks = self.chunks
        edges = np.searchsorted(positions, [chunk.first for chunk in chunks]).tolist()
        for chunk, start, end in zip(chunks, edges, [*edges[1:], len(positions)], strict=True):
            if start < end:
                yield chunk, slice(start, end)

    def _by_device(
        self, positions: npt.NDArray[np.int64]
    ) -> Iterator[tuple[torch.device, slice | npt.NDArray[np.int64]]]:
        """Where rows lie, and their places in `positions`."""
        if self.device.type == "cpu":
            if len(positions):
                yield self.device, slice(None)
            return
        chunks = self.chunks
        firsts = [chunk.first for chunk in chunks]
        on_host = np.array([chunk.device.type == "cpu" for chunk in chunks], np.bool_)
        here = on_host[np.searchsorted(firsts, positions, side="right") - 1]
        for device, of in ((_HOST, here), (self.device, ~here)):
            if of.any():
                yield device, np.flatnonzero(of)

    def _gather(self, positions: npt.NDArray[np.int64], device: torch.device) -> Tensor:
        """Rows of y in fp16 on a device, N×(P·D), at `positions`, which ascend."""
        kernels = kernels_on(self.device)
        if kernels is not None and [where for where, _ in self._by_device(positions)] == [
            self.device
        ]:
            at = torch.from_numpy(kernels.addresses(self.chunks, positions)).to(self.device)
            copies: Tensor = kernels.gather(at, self.parts * self.dim).to(device)
            return copies
        rows = torch.empty(len(positions), self.width, dtype=torch.float16, device=device)
        for chunk, places in self._by_chunk(positions):
            chunk.take(positions[places] - chunk.first, rows[places])
        return rows[:, : self.parts * self.dim]
