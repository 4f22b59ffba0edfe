"""A second, coarser memory of the features in bytes: what is read first, at half the traffic.

A lifted vector z is kept as codes q of −127 … 127, of

    r = (z − m) / t ≈ q,

where m is a mean of rows, and t gives the numbers of each place the range of a code. With
w = [w_y; w_s], the mean c of w_s, and u = t⊙[w_y; w_s − c] ≈ α·p, also in int8,

    ⟨w, z⟩ = ⟨w, m⟩ + c·n + ⟨u, r⟩,   n = Σ(s − m_s),
    |⟨u, r⟩ − α·⟨p, q⟩| ≤ ‖u‖·‖r − q‖ + ‖u − α·p‖·‖q‖   (Cauchy–Schwarz).

n, ‖r − q‖ and ‖q‖ are kept with q, so that each row has a lower and an upper bound of its score. A
row whose upper bound lies below the lower bounds of k others is not among the k best. All others,
some hundreds, are scored from their fp16 features as if there were no first pass. Taking c out
matters: γ⊙γ differs little from channel to channel, so that nearly all of it is in c·n.

The same codes are a flat index of FAISS, with which the recall stage finds what it scores in fp16.
It keeps q + 128 in a byte, and PyTorch multiplies such bytes too: α·⟨p, q + 128⟩ is off by a
constant.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.gallery.index.chunks import CHUNK_ROWS, scanned, scanner
from service.gallery.index.faiss_module import faiss

_FACTS = 3  # numbers in fp32 of a row: n, ‖r − q‖ and ‖q‖
BLOCK = CHUNK_ROWS["cpu"]  # rows that a thread reads at once
SAMPLE = 4096  # rows that m and t are made from
_LARGEST, _ZERO = 127, 128  # code, and the byte of code 0
_SERIAL_NUMBERS = 32_767  # torch shares out element-wise work of more numbers than this
# What fp32 rounds is far less than this share of a sum's largest terms.
_ROUNDING = 2.0**-20
_LEAST = 1e-15  # instead of a range of 0; the squares of fp16's numbers are larger
_FINEST = 2.0**-6  # of the usual range, a place's own at least
_FARTHEST = 1e30  # ‖r − q‖ that is kept, farther than any
# By codes a shortlist is chosen where their errors are below this share of how scores differ. A row
# that lies so many times as far from its code as most is kept apart.
_TELLING, _FAR = 1 / 24, 6


def code_bytes(rows: int, width: int) -> int:
    """Memory of the codes of so many lifted vectors."""
    return rows * (width + 4 * _FACTS)


@cache
def levels(width: int) -> int:
    """The largest p: 127, or 63 where a product with bytes is exact for no more; 0 for none.

    Without VNNI, oneDNN adds two products in int16, which may saturate. Other processors than
    x86 have no fast product of bytes in PyTorch.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return 0
    if not hasattr(torch, "_int_mm"):  # not documented: another PyTorch may lack it
        return 0
    signs = torch.ones(4, width, dtype=torch.int32)
    signs[1] = -1
    signs[2, ::2] = -1
    signs[3, : width // 2] = -1
    rows = _LARGEST * signs + _ZERO
    codes = rows.to(torch.uint8).repeat(BLOCK // len(rows), 1)
    for largest in (127, 63):
        asked = signs * largest
        try:
            found = [torch._int_mm(codes, p.to(torch.int8).view(-1, 1)) for p in asked]
        except RuntimeError:  # another PyTorch may know no product of these kinds
            return 0
        products = torch.cat(found, 1).view(-1, len(rows), len(asked))
        if bool((products == rows @ asked.T).all()):
            return largest
    return 0


class Coded(NamedTuple):
    """A query as the first pass reads it; what follows `constant` is divided by α, see the module.

    p: (P+1)·D×1 in int8. shift: ⟨p, q + 128⟩ − ⟨p, q⟩. constant: ⟨w, m⟩. of_rest, of_code: what
    ‖r − q‖ and ‖q‖ of a row are multiplied by in the bound on its error. slack: what is added.
    """

    p: Tensor
    shift: int
    alpha: float
    constant: float
    mean: float
    of_rest: float
    of_code: float
    slack: float

    def scaled(self, score: float) -> float:
        """A score in the terms of `Bounds`."""
        return (score - self.constant) / self.alpha


class Bounds(NamedTuple):
    """Upper bounds of (⟨w, z⟩ − ⟨w, m⟩) / α for N rows; the lower ones are twice `error` less."""

    upper: Tensor
    error: Tensor

    def bests(self, barred: Tensor | None, group: int) -> Tensor:
        """The largest lower bound of each group of so many rows, but for those that are barred.

        Its rows are far from each other, as a person's images are often enrolled together.
        """
        lower = torch.sub(self.upper, self.error, alpha=2)
        if barred is not None:
            lower.masked_fill_(barred, -torch.inf)
        groups = len(lower) // group
        bests, rest = lower[: groups * group], lower[groups * group :]
        largest = bests.view(group, groups).amax(0)
        return torch.cat([largest, rest]) if len(rest) else largest


class Block:
    """Codes of the rows `first` … `first` + `count` − 1, of `BLOCK` at most; scanned like a chunk.

    steps: t. scale: the same for all blocks, see `Chunk.scale`.
    """

    scale = 1.0

    def __init__(self, first: int, steps: npt.NDArray[np.float64]) -> None:
        self.first, self.count, self._steps = first, 0, steps
        codes = np.empty((BLOCK, len(steps)), np.uint8)  # in huge pages, as a chunk
        self.codes = torch.from_numpy(codes)
        self.facts = torch.empty(_FACTS, BLOCK)
        self._scanner = scanner(codes, faiss.ScalarQuantizer.QT_8bit_direct_signed)

    def projected(self, w: Tensor, dim: int) -> Tensor:
        """Q×(P+1)·D queries (float64, unscaled) as `scan` takes them: whole numbers in fp32."""
        asked = [_in_codes(u, _LARGEST)[0] for u in w.numpy() * self._steps]
        return torch.from_numpy(np.array(asked, np.float32))

    def scan(
        self, w: npt.NDArray[np.float32], count: int, allowed: Any
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """As `Chunk.scan`, but scores ⟨p, q⟩ in integers, which order the rows of one query."""
        return scanned(self._scanner, self.first, w, count, allowed)


class ByteCodes:
    """Codes of the first rows of a gallery in the host's memory, by position.

    One thread adds at a time; others may read the rows that were there before. sample: lifted
    vectors in fp32, N×(P+1)D, that m and t are made from. dim: D. apart: the rows that are far from
    their codes.
    """

    def __init__(self, sample: npt.NDArray[np.float32], dim: int) -> None:
        self._dim, self.width = dim, sample.shape[1]
        rows = torch.from_numpy(sample)
        self.m = rows.mean(0)
        ranges = (rows - self.m).abs().amax(0)
        for of_block in (ranges[:-dim], ranges[-dim:]):
            of_block.clamp_(min=max(_LEAST, _FINEST * float(of_block.mean())))
        self.t = ranges / _LARGEST
        # By the median, which a few rows far from all others do not move.
        self._differing = ((rows - self.m) / self.t).abs().median(0).values.double().numpy()
        self._steps = self.t.double().numpy()
        self.blocks: tuple[Block, ...] = ()
        self.apart = np.empty(0, np.int64)
        self._levels = levels(self.width)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        """Memory held, unused rows of the last block included."""
        return sum(block.codes.nbytes + block.facts.nbytes for block in self.blocks)

    def add(self, lifted: npt.NDArray[np.float32]) -> None:
        """Append rows. lifted: N×(P+1)D."""
        # So few at once that torch stays on this thread.
        for z in torch.split(torch.from_numpy(lifted), max(1, _SERIAL_NUMBERS // self.width)):
            while len(z):
                if self._count == BLOCK * len(self.blocks):
                    self.blocks = (*self.blocks, Block(self._count, self._steps))
                block = self.blocks[-1]
                part = z[: BLOCK - block.count]
                self._put(part, block)
                z = z[len(part) :]

    def _put(self, z: Tensor, block: Block) -> None:
        rows = slice(block.count, block.count + len(z))
        v = z - self.m
        n = v[:, -self._dim :].double().sum(1)
        r = v.div_(self.t)
        q = r.round().clamp_(-_LARGEST, _LARGEST)
        code = q.norm(dim=1)
        rest = r.sub_(q).norm(dim=1).clamp_(max=_FARTHEST)
        block.codes[rows] = q.add_(_ZERO).to(torch.uint8)
        block.facts[:, rows] = torch.stack([n.float(), rest, code])
        far = np.flatnonzero(rest.numpy() > _FAR * (self.width / 12) ** 0.5)
        if len(far):
            self.apart = np.concatenate([self.apart, self._count + far])
        block.count = rows.stop
        self._count += len(z)

    def telling(self, w: Tensor) -> bool:
        """Whether FAISS finds by codes what is best for a query (P+1)·D, float64."""
        u = w.numpy() * self._steps
        p, alpha = _in_codes(u, _LARGEST)
        of_query, differing = (u - p * alpha) * self._differing, u * self._differing
        of_rows = u @ u / 12  # the variance of what rounding leaves out
        return bool(of_query @ of_query + of_rows < _TELLING**2 * (differing @ differing))

    def coded(self, w: Tensor, rounding: float) -> Coded:
        """A query (P+1)·D, float64. rounding: by how much other scores of it are rounded."""
        u = w.numpy().copy()
        s, t = u[-self._dim :], self._steps
        constant = float(u @ self.m.numpy())
        c = float(s.mean())
        s -= c
        u *= t
        norm = float(np.linalg.norm(u))
        p, alpha = _in_codes(u, self._levels)
        rest = float(np.linalg.norm(u - p * alpha))
        # r, n and the norms are rounded, and so is c·n + α·⟨p, q⟩; |n| ≤ ‖t_s‖·‖r‖.
        rounded = _ROUNDING * (norm + rest + abs(c) * float(np.linalg.norm(t[-self._dim :])))
        margin = 1 + self.width * 2.0**-22
        return Coded(
            torch.from_numpy(p.astype(np.int8)).view(-1, 1),
            _ZERO * int(p.sum()),
            alpha,
            constant,
            mean=c / alpha,
            of_rest=(margin * norm + rounded) / alpha,
            of_code=(margin * rest + rounded) / alpha,
            slack=rounding / alpha,
        )

    def bounds(self, rows: slice, query: Coded, upper: Tensor) -> Bounds:
        """Of the scores of rows of one block, rounded or not. upper: for the upper ones, N."""
        block = self.blocks[rows.start // BLOCK]
        within = slice(rows.start % BLOCK, rows.start % BLOCK + rows.stop - rows.start)
        n, rest, code = block.facts[:, within]
        products = torch._int_mm(block.codes[within], query.p)[:, 0].sub_(query.shift)
        error = (rest * query.of_rest).add_(code, alpha=query.of_code)
        torch.add(torch.add(products, n, alpha=query.mean), error, out=upper)
        return Bounds(upper, error)


def _in_codes(u: npt.NDArray[np.float64], largest: int) -> tuple[npt.NDArray[np.float64], float]:
    """p and α for u ≈ α·p, with whole numbers up to `largest`."""
    alpha = max(float(np.abs(u).max()) / largest, _LEAST**2)
    return np.rint(u / alpha), alpha
