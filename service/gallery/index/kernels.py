"""Kernels for a GPU, in Triton: few launches, however many chunks a gallery has.

`best` reads the rows of all chunks once for all queries and leaves out what their masks bar;
`part_distances` and `gather` read some rows, wherever they are. Chunks, rows and masks are found by
their addresses, which are copied to the GPU as one small table: a launch for every chunk would take
longer than reading it. Only imported where Triton is there; its interpreter runs them on a CPU in
the tests.

Rounding: a product of two fp16 numbers is exact in fp32, and n of them are added in fp32, in some
order, which is what `inner_products.rounding_bound` bounds. Distances are computed in float64.
"""

# Triton reads the kernels as its own language.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from service.gallery.index.chunks import Chunk

ROWS = 128  # of a tile, which one program scores
_NUMBERS = 64  # of a row, multiplied at once
_LEAST_QUERIES, _MOST_QUERIES = 16, 32  # of a program; matrix units take 16 at least
OPTIONS = {"num_warps": 8}  # with fewer, sums do not fit a thread's registers
_SCORES = 1 << 24  # are held at once: 64 MiB
_LOW: tl.constexpr = tl.constexpr(2.0**-11)  # the scale of the low half, see `halves`


def best(
    chunks: Sequence[Chunk],
    counts: Sequence[int],
    queries: tuple[Tensor, Tensor],
    masks: Sequence[Tensor],
    count: int,
    parts: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Best `count` inner products of Q queries → scores and positions Q×count; −inf: no more rows.

    counts: rows of each chunk. queries: both halves 2Q×Z fp16, high ones first, and the powers of
    two Q×2 that y's and s's products are multiplied by. masks: one flag per position for each
    query, on the device; rows beyond one do not exist. parts: how many numbers y and s have.

    A tile's largest score is kept beside all scores: the best `count` rows lie in the `count` tiles
    with the largest ones, so that few scores are read again.
    """
    both, sizes = queries
    device = both.device
    query_count = len(both) // 2
    tiles_of = -(-max(counts) // ROWS)  # of a chunk
    step = max(1, _SCORES // (query_count * tiles_of * ROWS))
    table = torch.from_numpy(_table(chunks, counts)).to(device)
    flags = torch.from_numpy(
        np.array([[mask.data_ptr(), len(mask)] for mask in masks], np.int64)
    ).to(device)
    found = []
    for start in range(0, len(chunks), step):
        here = table[start : start + step]
        tiles = len(here) * tiles_of
        scores = torch.empty(query_count, tiles, ROWS, device=device)
        largest = torch.empty(query_count, tiles, device=device)
        block = min(_MOST_QUERIES, max(_LEAST_QUERIES, triton.next_power_of_2(query_count)))
        with _current(device):
            blocks = -(-query_count // block)
            _score[(blocks * tiles,)](  # other dimensions of a grid end at 65,535
                *(here, both, sizes, flags, scores, largest),
                *(query_count, blocks, tiles_of, tiles, *parts),
                ROWS=ROWS,
                QUERIES=block,
                NUMBERS=_NUMBERS,
                **OPTIONS,
            )
        found.append(_top(scores, largest, here[:, 1], tiles_of, count))
    if len(found) == 1:
        return found[0]
    scores, positions = (torch.cat(of, 1) for of in zip(*found, strict=True))
    scores, kept = scores.topk(min(count, scores.shape[1]))
    return scores, positions.gather(1, kept)


def part_distances(rows: Tensor, given: Tensor, parts: int) -> Tensor:
    """Squared modulated distances of N rows, each to a query, by part: N×P, float64.

    rows: what `addresses` gives, on the device. given: x, γ and β of Q queries, Q×(P+2)×D, float64.
    """
    squared = torch.empty(len(rows), parts, dtype=torch.float64, device=rows.device)
    if len(rows):
        dim = given.shape[2]
        with _current(rows.device):
            _distances[(len(rows),)](
                rows, given, squared, parts, dim, NUMBERS=triton.next_power_of_2(dim)
            )
    return squared


def gather(rows: Tensor, width: int) -> Tensor:
    """The first `width` numbers of N rows, given by `addresses`: N×width, fp16."""
    copies = torch.empty(len(rows), width, dtype=torch.float16, device=rows.device)
    if len(rows):
        with _current(rows.device):
            _gather[(len(rows),)](rows, copies, width, NUMBERS=1024)
    return copies


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the thread's current GPU, which may be another of several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def addresses(
    chunks: Sequence[Chunk],
    positions: npt.NDArray[np.int64],
    queries: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Where the rows at `positions` begin, and each one's query (0): N×2.

    All rows are in these chunks, which ascend.
    """
    firsts = np.array([chunk.first for chunk in chunks], np.int64)
    starts = np.array([chunk.z.data_ptr() for chunk in chunks], np.int64)
    places = np.searchsorted(firsts, positions, side="right") - 1
    bytes_of_row = chunks[0].z.stride(0) * chunks[0].z.element_size() if chunks else 0
    rows = starts[places] + (positions - firsts[places]) * bytes_of_row
    return np.column_stack([rows, np.zeros_like(rows) if queries is None else queries])


def _table(chunks: Sequence[Chunk], counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Of each chunk: its address, first position, rows, and 1/scale as the bits of a float64."""
    rows = [
        (chunk.z.data_ptr(), chunk.first, count)
        for chunk, count in zip(chunks, counts, strict=True)
    ]
    bits = np.array([1 / chunk.scale for chunk in chunks], np.float64).view(np.int64)
    return np.column_stack([np.array(rows, np.int64), bits])


def _top(
    scores: Tensor, largest: Tensor, firsts: Tensor, tiles_of: int, count: int
) -> tuple[Tensor, Tensor]:
    """The best `count` of Q×T×ROWS scores, and their positions."""
    tiles = largest.topk(min(count, largest.shape[1]), sorted=False).indices
    near = scores.gather(1, tiles[..., None].expand(-1, -1, ROWS)).flatten(1)
    values, kept = near.topk(min(count, near.shape[1]))
    tile = tiles.gather(1, kept // ROWS)
    return values, firsts[tile // tiles_of] + tile % tiles_of * ROWS + kept % ROWS


@triton.jit
def _products(rows, present, both, asked, low, begin, end, width, NUMBERS: tl.constexpr):
    """Products of the numbers `begin` … `end` of rows with those of queries."""
    numbers = tl.arange(0, NUMBERS)
    high_sum = tl.zeros((rows.shape[0], asked.shape[0]), tl.float32)
    low_sum = tl.zeros((rows.shape[0], asked.shape[0]), tl.float32)
    for start in range(begin, end, NUMBERS):
        place = start + numbers
        inside = place < end
        z = tl.load(
            rows[:, None] + place[None, :], mask=present[:, None] & inside[None, :], other=0.0
        )
        query = both + asked[None, :] * width + place[:, None]
        wanted = (asked < low)[None, :] & inside[:, None]
        high_sum = tl.dot(z, tl.load(query, mask=wanted, other=0.0), high_sum)
        low_sum = tl.dot(z, tl.load(query + low * width, mask=wanted, other=0.0), low_sum)
    return high_sum + low_sum * _LOW


# Sizes that change with the gallery are no reason to compile again.
@triton.jit(do_not_specialize=["query_count", "blocks", "tiles_of", "tiles"])
def _score(
    table,
    both,
    sizes,
    flags,
    scores,
    largest,
    query_count,
    blocks,
    tiles_of,
    tiles,
    y_numbers,
    s_numbers,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """One tile of rows for some queries: all scores, and the largest of each query."""
    tile = tl.program_id(0) // blocks
    entry = table + tile // tiles_of * 4
    z = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.float16)), 16)
    first = tl.load(entry + 1)
    count = tl.load(entry + 2)
    scale = tl.load((entry + 3).to(tl.pointer_type(tl.float64))).to(tl.float32)
    row = (tile % tiles_of * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    present = row < count
    asked = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    real = asked < query_count
    mask = tl.load(flags + asked * 2, mask=real, other=0).to(tl.pointer_type(tl.int8))
    length = tl.load(flags + asked * 2 + 1, mask=real, other=0)
    place = first + row
    allowed = present[:, None] & (place[:, None] < length[None, :])
    allowed = tl.load(mask[None, :] + place[:, None], mask=allowed, other=0) != 0

    width = y_numbers + s_numbers
    rows = z + row * width
    y_size = tl.load(sizes + asked * 2, mask=real, other=0.0)
    s_size = tl.load(sizes + asked * 2 + 1, mask=real, other=0.0) * scale
    y = _products(rows, present, both, asked, query_count, 0, y_numbers, width, NUMBERS)
    s = _products(rows, present, both, asked, query_count, y_numbers, width, width, NUMBERS)
    score = tl.where(allowed, y * y_size[None, :] + s * s_size[None, :], float("-inf"))
    out = (asked.to(tl.int64) * tiles + tile)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
    tl.store(scores + out, score, mask=real[None, :])
    tl.store(largest + asked * tiles + tile, tl.max(score, 0), mask=real)


@triton.jit
def _distances(rows, given, squared, parts, dim, NUMBERS: tl.constexpr):
    """One row: of every part Σ (x − (γ⊙y + β))²."""
    row = tl.program_id(0)
    numbers = tl.arange(0, NUMBERS)
    inside = numbers < dim
    y = tl.load(rows + 2 * row).to(tl.pointer_type(tl.float16)) + numbers
    given += tl.load(rows + 2 * row + 1) * (parts + 2) * dim
    gamma = tl.load(given + parts * dim + numbers, mask=inside, other=0.0)
    beta = tl.load(given + (parts + 1) * dim + numbers, mask=inside, other=0.0)
    for part in range(parts):
        x = tl.load(given + part * dim + numbers, mask=inside, other=0.0)
        mine = tl.load(y + part * dim, mask=inside, other=0.0).to(tl.float64)
        apart = x - (gamma * mine + beta)
        tl.store(squared + row * parts + part, tl.sum(apart * apart, 0))


@triton.jit
def _gather(rows, copies, width, NUMBERS: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + 2 * row).to(tl.pointer_type(tl.float16))
    for start in range(0, width, NUMBERS):
        place = start + tl.arange(0, NUMBERS)
        inside = place < width
        numbers = tl.load(source + place, mask=inside)
        tl.store(copies + row * width + place, numbers, mask=inside)
