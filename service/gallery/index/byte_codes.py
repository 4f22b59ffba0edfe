"""A first pass over bytes: which rows can be among the best, at half the memory traffic.

A lifted vector z is kept a second time as int8 codes q with a factor a for each row, of

    v = [y − m_y; t·(s − m_s)] ≈ a·q,

where m is a mean of rows and t, a power of two, gives both blocks the same range. With
w = [w_y; w_s], the mean c of w_s, and u = [w_y; (w_s − c)/t] ≈ α·p, also in int8,

    ⟨w, z⟩ = ⟨w, m⟩ + c·n + ⟨u, v⟩,   n = Σ(s − m_s),
    |⟨u, v⟩ − αa·⟨p, q⟩| ≤ ‖u‖·‖v − a·q‖ + ‖u − α·p‖·‖a·q‖   (Cauchy–Schwarz).

n, ‖v − a·q‖ and ‖a·q‖ are kept with a, so that each row has a lower and an upper bound of its
score. A row whose upper bound lies below the lower bounds of k others is not among the k best. All
others, some hundreds, are scored from their fp16 features as if there were no first pass. Taking c
out matters: γ⊙γ differs little from channel to channel, so that nearly all of it is in c·n.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.gallery.index.chunks import CHUNK_ROWS

_FACTS = 4  # numbers in fp32 of a row: a, n, ‖v − a·q‖ and ‖a·q‖
BLOCK = CHUNK_ROWS["cpu"]  # rows that a thread reads at once
SAMPLE = 4096  # rows that m and t are made from
_SERIAL_NUMBERS = 32_767  # torch shares out element-wise work of more numbers than this
# What fp32 rounds is far less than this share of a sum's largest terms.
_ROUNDING = 2.0**-20
_LEAST = 1e-30  # instead of a range of 0


def code_bytes(rows: int, width: int) -> int:
    """Memory of the codes of so many lifted vectors."""
    return rows * (width + 4 * _FACTS)


@cache
def levels(width: int) -> int:
    """The largest code: 127, or 63 where a product of int8 rows is exact for no more; 0 for none.

    Without VNNI, oneDNN adds two products in int16, which may saturate. Other processors than
    x86 have no fast product of int8 in PyTorch.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return 0
    if not hasattr(torch, "_int_mm"):  # not documented: another PyTorch may lack it
        return 0
    signs = torch.ones(4, width, dtype=torch.int8)
    signs[1] = -1
    signs[2, ::2] = -1
    signs[3, : width // 2] = -1
    expected = signs.int() @ signs.int().T
    for largest in (127, 63):
        rows = (signs * largest).repeat(BLOCK // len(signs), 1)
        found = [torch._int_mm(rows, query.view(-1, 1)) for query in signs * largest]
        products = torch.cat(found, 1).view(-1, len(signs), len(signs))
        if bool((products == expected * largest**2).all()):
            return largest
    return 0


class Coded(NamedTuple):
    """A query as the first pass reads it; what follows α is divided by it, see the module.

    p: (P+1)·D×1 in int8. mean: c. of_rest, of_code: what ‖v − a·q‖ and ‖a·q‖ of a row are
    multiplied by in the bound on its error. slack: what is added to it.
    """

    p: Tensor
    alpha: float
    mean: float
    of_rest: float
    of_code: float
    slack: float


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


class _Block(NamedTuple):
    q: Tensor  # rows×(P+1)D int8
    facts: Tensor  # `_FACTS`×rows fp32


class ByteCodes:
    """Codes of the first rows of a gallery in the host's memory, by position.

    One thread adds at a time; others may read the rows that were there before. sample: lifted
    vectors in fp32, N×(P+1)D, that m and t are made from. dim: D.
    """

    def __init__(self, sample: npt.NDArray[np.float32], dim: int) -> None:
        self._dim, self.width = dim, sample.shape[1]
        rows = torch.from_numpy(sample)
        self.m = rows.mean(0)
        largest = (rows - self.m).abs()
        y, s = (
            float(block.amax(1).mean())
            for block in torch.split(largest, [self.width - dim, dim], 1)
        )
        self._t = 2.0 ** round(float(np.log2(max(y, _LEAST) / max(s, _LEAST))))
        self._levels = levels(self.width)
        self.blocks: tuple[_Block, ...] = ()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        """Memory held, unused rows of the last block included."""
        return sum(block.q.nbytes + block.facts.nbytes for block in self.blocks)

    def add(self, lifted: npt.NDArray[np.float32]) -> None:
        """Append rows. lifted: N×(P+1)D."""
        # So few at once that torch stays on this thread.
        for z in torch.split(torch.from_numpy(lifted), max(1, _SERIAL_NUMBERS // self.width)):
            while len(z):
                start = self._count % BLOCK
                if start == 0 and self._count == BLOCK * len(self.blocks):
                    q = torch.empty(BLOCK, self.width, dtype=torch.int8)
                    self.blocks = (*self.blocks, _Block(q, torch.empty(_FACTS, BLOCK)))
                part = z[: BLOCK - start]
                self._put(part, self.blocks[-1], slice(start, start + len(part)))
                self._count += len(part)
                z = z[len(part) :]

    def _put(self, z: Tensor, block: _Block, rows: slice) -> None:
        v = z - self.m
        s = v[:, -self._dim :]
        n = s.double().sum(1)
        s *= self._t
        a = v.abs().amax(1, keepdim=True).clamp_min_(_LEAST) / self._levels
        q = (v / a).round_()
        code = q.norm(dim=1) * a[:, 0]
        rest = v.sub_(q * a).norm(dim=1)
        block.q[rows] = q.to(torch.int8)
        block.facts[:, rows] = torch.stack([a[:, 0], n.float(), rest, code])

    def coded(self, w: Tensor, rounding: float) -> Coded:
        """A query (P+1)·D, float64. rounding: by how much other scores of it are rounded."""
        u = w.numpy().copy()
        s = u[-self._dim :]
        c = float(s.mean())
        s -= c
        s /= self._t
        norm = float(np.linalg.norm(u))
        alpha = max(float(np.abs(u).max()), _LEAST) / self._levels
        p = np.rint(u / alpha)
        rest = float(np.linalg.norm(u - p * alpha))
        # v, n and the norms are rounded, and so is c·n + αa·⟨p, q⟩; |n| ≤ √D/t · ‖v‖.
        rounded = _ROUNDING * (norm + rest + abs(c) * self._dim**0.5 / self._t)
        margin = 1 + self.width * 2.0**-22
        return Coded(
            torch.from_numpy(p.astype(np.int8)).view(-1, 1),
            alpha,
            mean=c / alpha,
            of_rest=(margin * norm + rounded) / alpha,
            of_code=(margin * rest + rounded) / alpha,
            slack=rounding / alpha,
        )

    def bounds(self, rows: slice, query: Coded, upper: Tensor) -> Bounds:
        """Of the scores of rows of one block, rounded or not. upper: for the upper ones, N."""
        block = self.blocks[rows.start // BLOCK]
        within = slice(rows.start % BLOCK, rows.start % BLOCK + rows.stop - rows.start)
        a, n, rest, code = block.facts[:, within]
        products = torch._int_mm(block.q[within], query.p)[:, 0]
        error = (rest * query.of_rest).add_(code, alpha=query.of_code)
        torch.add((products * a).add_(n, alpha=query.mean), error, out=upper)
        return Bounds(upper, error)
