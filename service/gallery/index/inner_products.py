"""Best inner products of projected queries with all lifted rows: by FAISS's scan or by products.

Two ways to the same answer. A scan reads the fp16 rows once per query, without widening them in
memory; a product widens a block of rows once for all queries. Milliseconds of one core of an AMD
EPYC (AVX2 only), for the 320 best of N = 100,000 with P·D = 768:

    Q          1     2     4     8    32
    scan      31    46    90   204   711
    product   79    87   119   129   261

Both round. `rounding_bound` says by how much at most, so that a caller can prove that no row was
lost, and ask for more rows where it cannot.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.precision import choose_precision
from service.gallery.index.byte_codes import BLOCK, Block, ByteCodes, Coded
from service.gallery.index.chunks import Chunk, Mask, selecting
from service.gallery.index.faiss_module import faiss, one_thread
from service.gallery.index.features import BLOCK_ROWS, Features
from service.gallery.index.gpu_products import best as on_gpu
from service.gallery.index.room import with_less
from service.kit.precedence import give_way

# A CPU scans for up to this many queries and multiplies for more.
_SCAN_QUERIES = 4
_SERIAL_CHUNKS = 2  # for so few, waiting for threads takes longer than they save
SLACK, _SLACK_BF16 = 64, 1024
# Codes are read first where there are so many rows for each one that is wanted, which leaves few
# to be scored (`cmt bench rescore`), and where masks let this share of them pass.
_CODED_RATIO, _CODED_AMONG = 256, 0.5
_POSSIBLE_MOST = 0.1  # where a larger share is left, all rows are scanned instead
_UNCODED_MOST = 4096  # where more rows have no codes yet, all are scanned
# A shortlist is found by codes where so many times as many rows are searched, and no more than this
# have no codes, or are far from theirs. A quarter more rows are taken, with which the codes' errors
# cost no row of a shortlist of features like those of rendered crops.
_LISTED_RATIO, _UNLISTED_MOST, _LISTED_MORE = 16, 512, 0.25
_POSSIBLE_FIRST = 2  # so many times as many rows as are wanted are scored before the others
# Rows are taken in groups of so many at most: k groups with a row above a score have k such rows.
# With fewer than `_GROUPS` groups for each row that is wanted, the best would often share one.
_GROUP, _GROUPS = 32, 8
_LIBC = ctypes.CDLL(None)  # Python does not say on which core a thread is
_TOP_ROWS = 4096  # columns of scores that are collected before the best are picked out
# What `_selected` gave, by the mask's identity, then by the chunk's first row and number of rows.
_selections: dict[int, dict[tuple[int, int], Any]] = {}


Item = TypeVar("Item")
Result = TypeVar("Result")


class Best(NamedTuple):
    """Positions with the largest inner products, best first, and their scores, M rows.

    complete: no other row that was searched can be among those that were asked for. coarse: there
    are some more rows than that, in no order, whose scores are to be computed.
    """

    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    complete: bool = False
    coarse: bool = False

    def first(self, count: int) -> Best:
        """The first `count` of them."""
        return Best(self.positions[:count], self.scores[:count])


@torch.inference_mode()
def scan(features: Features, w: Tensor, count: int, allowed: Sequence[Mask]) -> list[Best]:
    """Best `count` rows of each of Q queries, each query computed by itself.

    w: Q×(P+1)D float64, unscaled, on the CPU. allowed: one mask per query over the first rows;
    rows beyond it do not exist for that query. Rows on a GPU are multiplied, see `gpu_products`.
    """
    return [one.first(count) for one in _scanned(features, w, count, allowed, 0)]


@torch.inference_mode()
def shortlist(features: Features, w: Tensor, count: int, allowed: Sequence[Mask]) -> list[Best]:
    """As `scan`; by the codes alone, hence `coarse`, where that saves time."""
    found: dict[int, Best] = {}
    for members in sharing(allowed):
        mask = allowed[members[0]]
        codes = _choosing(features, count, mask)
        if codes is not None and (told := [query for query in members if codes.telling(w[query])]):
            best = _listed(codes, features.dim, w[told], count, mask)
            found.update(zip(told, best, strict=True))
    rest = [query for query in range(len(w)) if query not in found]
    if rest:
        best = scan(features, w[rest], count, [allowed[query] for query in rest])
        found.update(zip(rest, best, strict=True))
    return [found[query] for query in range(len(w))]


@torch.inference_mode()
def multiply(
    features: Features, w: Tensor, count: int, allowed: Sequence[Mask], *, exact: bool = False
) -> list[Best]:
    """As `scan`, by one matrix product of all queries with block after block of rows.

    Memory: one block of rows and Q×(count + 4096) scores, whatever N. exact: multiply in fp32 even
    where bf16 is faster.
    """
    return _searched(features, w, count, allowed, partial(_multiply, exact=exact))


def exhaustive(
    features: Features, w: Tensor, count: int, allowed: Sequence[Mask], *, exact: bool
) -> tuple[list[Best], bool]:
    """Candidates for the `count` best by the faster way, and whether it was exact to fp32.

    They are a few more than `count`, so that rounding rarely keeps a caller from proving that the
    best are among them, or `complete`. exact: not in bf16.
    """
    if len(w) <= _SCAN_QUERIES:
        return _scanned(features, w, count, allowed, SLACK), True
    exact = exact or product_dtype(features.device, exact) != torch.bfloat16
    slack = SLACK if exact else _SLACK_BF16
    return multiply(features, w, count + slack, allowed, exact=exact), exact


def rounding_bound(features: Features, w: Tensor, *, exact: bool) -> float:
    """By how much the score of any row may differ from ⟨w, z(y)⟩, at most.

    With A ≥ Σ|w_i z_i| by Cauchy–Schwarz for y and s apart: an fp32 sum of n products in any order
    errs by n·u/(1 − n·u)·A, u = 2⁻²⁴ (Higham, Accuracy and Stability, §3.1), w and s as given to it
    by a few u·A more. Added to it is what s lost in fp16, ‖γ⊙γ‖·max‖s̃ − s‖, measured when rows
    were added. A GPU's units truncate where a CPU rounds: 4 times; that its kernel adds y's and s's
    products apart, each for two halves of w, is another order. bf16 rounds w, z and the sum.
    """
    norms = features.norms
    y, s = (math.sqrt(part @ part) for part in np.split(w.numpy(), [-features.dim]))
    total = y * norms.y + s * (norms.s + norms.s_error)
    unit = 2.0**-24 * (features.width + features.parts + 8) * 1.01
    if features.device.type != "cpu":
        unit *= 4
    if product_dtype(features.device, exact) == torch.bfloat16:
        unit += 3.1 * 2.0**-9
    return unit * total + s * norms.s_error


def product_dtype(device: torch.device, exact: bool) -> torch.dtype:
    """The dtype of products of blocks: fp16 on a GPU, on a CPU fp32 or, where faster, bf16."""
    if device.type != "cpu":
        return torch.float16
    return torch.float32 if exact else choose_precision("cpu").dtype


_EMPTY = Best(np.empty(0, np.int64), np.empty(0, np.float32))

# Chunks in host memory, and what `scan` takes → what each query finds there.
_OnHost = Callable[[Sequence[Chunk], int, Tensor, int, Sequence[Mask]], list[Best]]


def _searched(
    features: Features, w: Tensor, count: int, allowed: Sequence[Mask], on_host: _OnHost
) -> list[Best]:
    """What is found in both memories. A GPU computes while the host searches its own rows."""
    chunks = features.chunks
    host = [chunk for chunk in chunks if chunk.z.device.type == "cpu"]
    if len(host) == len(chunks):
        return on_host(host, features.dim, w, count, allowed)
    there = [chunk for chunk in chunks if chunk.z.device.type != "cpu"]

    def launched(device: torch.device, most: int) -> list[tuple[Tensor, Tensor]]:
        """Scores and positions of `most` queries at once; nothing where the host must do it."""
        starts = range(0, len(w), most) if device.type != "cpu" else ()
        return [
            on_gpu(
                there, features.dim, w[start : start + most], count, allowed[start : start + most]
            )
            for start in starts
        ]

    pending = with_less(launched, there[0].z.device, len(w), least=1)
    parts = [on_host(host, features.dim, w, count, allowed)] if host else []
    if pending:
        found = []
        for scores, positions in pending:
            for row, places in zip(scores.cpu().numpy(), positions.cpu().numpy(), strict=True):
                real = np.isfinite(row)
                found.append(Best(places[real], row[real]))
        parts.append(found)
    else:
        pieces = (piece for chunk in there for piece in chunk.on_host(chunk.count))
        parts += [on_host([piece], features.dim, w, count, allowed) for piece in pieces]
    if len(parts) == 1:
        return parts[0]
    return [merged([part[query] for part in parts], count) for query in range(len(w))]


def _scanned(
    features: Features, w: Tensor, count: int, allowed: Sequence[Mask], slack: int
) -> list[Best]:
    """As `scan`; all rows that can be among the best, or `slack` more than `count`."""
    found = _by_codes(features, w, count, allowed)
    rest = [query for query in range(len(w)) if query not in found]
    if rest:
        masks = [allowed[query] for query in rest]
        best = _searched(features, w[rest], count + slack, masks, _scan)
        found.update(zip(rest, best, strict=True))
    return [found[query] for query in range(len(w))]


def _choosing(features: Features, count: int, mask: Mask) -> ByteCodes | None:
    """The codes, where a shortlist of what a mask lets pass is to be found by them."""
    codes = features.codes
    if codes is None:
        return None
    uncoded = len(mask) - min(len(codes), len(mask))
    few = uncoded + len(codes.apart) <= _UNLISTED_MOST
    return codes if few and int(np.count_nonzero(mask)) >= _LISTED_RATIO * count else None


def _listed(codes: ByteCodes, dim: int, w: Tensor, count: int, mask: Mask) -> list[Best]:
    """What codes find for each query, and all rows that codes say little of."""
    coded = min(len(codes), len(mask))
    apart = codes.apart[codes.apart < coded]
    others = np.concatenate([apart[mask[apart]], coded + np.flatnonzero(mask[coded:])])
    blocks = codes.blocks[: -(-coded // BLOCK)]
    more = count + math.ceil(_LISTED_MORE * count)
    best = []
    for near in _scan(blocks, dim, w, more, [mask] * len(w)):
        rows = np.union1d(near.positions, others) if len(others) else near.positions
        best.append(Best(rows, np.zeros(len(rows), np.float32), coarse=True))
    return best


def _by_codes(
    features: Features, w: Tensor, count: int, allowed: Sequence[Mask]
) -> dict[int, Best]:
    """All rows that can be among the `count` best of a query, by query; see `byte_codes`.

    Queries are left out where there are no codes, or reading all of them would not pay.
    """
    codes, most = features.codes, max(map(len, allowed))
    if codes is None or len(codes) < _CODED_RATIO * count:
        return {}
    coded = min(len(codes), *map(len, allowed))
    if most - coded > _UNCODED_MOST:
        return {}
    # A query that is asked with several masks is multiplied once.
    same: dict[bytes, list[int]] = {}
    for query, row in enumerate(w.numpy()):
        same.setdefault(row.tobytes(), []).append(query)
    found = {}
    for members in same.values():
        masks = {id(allowed[query]): allowed[query] for query in members}
        among = sum(int(np.count_nonzero(mask[:coded])) for mask in masks.values())
        if among < _CODED_AMONG * coded:
            continue
        one = w[members[0]]
        # Twice: the scores are rounded, and so were the lifted vectors that were coded.
        query_coded = codes.coded(one, 2 * rounding_bound(features, one, exact=True))
        best = {}
        possible = _possible(codes, query_coded, count, [mask[:coded] for mask in masks.values()])
        if sum(len(rows) for rows, _ in possible) > _POSSIBLE_MOST * coded:
            continue
        for mask, (rows, upper) in zip(masks.values(), possible, strict=True):
            late = coded + np.flatnonzero(mask[coded:]) if len(mask) > coded else None
            best[id(mask)] = _narrowed(features, one, query_coded, count, rows, upper, late)
        found.update({query: best[id(allowed[query])] for query in members})
    return found


def _narrowed(
    features: Features,
    w: Tensor,
    query: Coded,
    count: int,
    rows: npt.NDArray[np.int64],
    upper: npt.NDArray[np.float32],
    late: npt.NDArray[np.int64] | None,
) -> Best:
    """What is left of possible rows once some are scored, and all rows without codes.

    The scores of the first ones say more of the `count`-th best than the lower bounds of any.
    """
    first, scores = rows, []
    if len(rows) > _POSSIBLE_FIRST * count:
        nearest = np.zeros(len(rows), np.bool_)
        nearest[np.argpartition(upper, -_POSSIBLE_FIRST * count)[-_POSSIBLE_FIRST * count :]] = True
        first = rows[nearest]
        scores.append(features.scores(w, first))
        least = query.scaled(float(np.partition(scores[0], -count)[-count])) - 2 * query.slack
        rest = rows[~(nearest | (upper < least))]
        first, rows = np.concatenate([first, rest]), rest
    if late is not None:
        first, rows = np.concatenate([first, late]), np.concatenate([rows, late])
    scores.append(features.scores(w, rows))
    every = np.concatenate(scores)
    order = np.lexsort((first, -every))
    return Best(first[order], every[order], complete=True)


def _possible(
    codes: ByteCodes, query: Coded, count: int, masks: Sequence[Mask]
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """The rows that can be among the `count` best of those that a mask lets pass, which ascend.

    With upper bounds of their scores, see `Bounds`. masks: over as many of the first rows as are
    coded.
    """
    coded = len(masks[0])
    group = min(_GROUP, max(1, coded // (_GROUPS * count)))
    upper = torch.empty(coded)
    barred = [None if mask.all() else torch.from_numpy(~mask) for mask in masks]

    @torch.inference_mode()  # which holds for one thread
    def read(start: int) -> list[Tensor]:
        rows = slice(start, min(coded, start + BLOCK))
        bounds = codes.bounds(rows, query, upper[rows])
        return [bounds.bests(None if of is None else of[rows], group) for of in barred]

    starts = range(0, coded, BLOCK)
    bests = _shared(read, starts, least=_SERIAL_CHUNKS + 1)
    uppers = upper.numpy()
    possible = []
    for mask, of in zip(masks, zip(*bests, strict=True), strict=True):
        every = torch.cat(of)
        least = float(every.kthvalue(len(every) - count + 1).values) - 2 * query.slack
        # Not `>=`, which would drop what is not a number.
        rows = np.flatnonzero(~(uppers < least))
        rows = rows[mask[rows]]
        possible.append((rows, uppers[rows]))
    return possible


def _scan(
    chunks: Sequence[Chunk | Block], dim: int, w: Tensor, count: int, allowed: Sequence[Mask]
) -> list[Best]:
    groups = [(members, allowed[members[0]]) for members in sharing(allowed)]
    scales = {chunk.scale: chunk for chunk in chunks}
    projected = {scale: chunk.projected(w, dim).numpy() for scale, chunk in scales.items()}
    search = partial(_scan_chunk, projected=projected, count=count, groups=groups)
    if len(chunks) > _SERIAL_CHUNKS:
        found = _shared(search, chunks)
    else:
        # FAISS would wake a thread for each core, and wait for it, also for a single query.
        most = max((len(members) for members, _ in groups), default=1)
        faiss.omp_set_num_threads(min(_cores(), most))  # of this thread only
        found = list(map(search, chunks))
    return [merged([of[query] for of in found if query in of], count) for query in range(len(w))]


def _multiply(
    chunks: Sequence[Chunk],
    dim: int,
    w: Tensor,
    count: int,
    allowed: Sequence[Mask],
    *,
    exact: bool,
) -> list[Best]:
    dtype = product_dtype(w.device, exact)
    groups = list(sharing(allowed))
    scores = torch.full((len(w), 0), -torch.inf)
    positions = torch.empty(len(w), 0, dtype=torch.int64)
    for chunk, rows in _strips(chunks, max(map(len, allowed), default=0)):
        queries = chunk.projected(w, dim).to(dtype)
        products = []
        for a, b in rows:
            give_way()
            # Via fp32: from fp16 to bf16 at once takes four times as long on a CPU.
            products.append((queries @ chunk.z[a:b].float().to(dtype).T).float())
        block = torch.cat(products, dim=1)
        low, high = chunk.first + rows[0][0], chunk.first + rows[-1][1]
        for members in groups:
            barred = np.ones(high - low, np.bool_)
            part = allowed[members[0]][low:high]
            barred[: len(part)] = ~part
            if barred.any():
                block[members] = block[members].masked_fill(torch.from_numpy(barred), -torch.inf)
        places = torch.arange(low, high).expand(len(w), -1)
        scores, kept = torch.cat([scores, block], 1).topk(
            min(count, scores.shape[1] + block.shape[1]), dim=1
        )
        positions = torch.cat([positions, places], 1).gather(1, kept)
    results = []
    for row, places in zip(scores.numpy(), positions.numpy(), strict=True):
        real = np.isfinite(row)
        results.append(Best(places[real], row[real]))
    return results


def _strips(chunks: Sequence[Chunk], count: int) -> Iterator[tuple[Chunk, list[tuple[int, int]]]]:
    """Chunks cut into strips of `_TOP_ROWS`, and these into blocks that are widened at once."""
    step = BLOCK_ROWS["cpu"]
    for chunk in chunks:
        end = min(chunk.count, count - chunk.first)
        for start in range(0, end, _TOP_ROWS):
            last = min(start + _TOP_ROWS, end)
            yield chunk, [(a, min(a + step, last)) for a in range(start, last, step)]


def _scan_chunk(
    chunk: Chunk | Block,
    *,
    projected: Mapping[float, npt.NDArray[np.float32]],
    count: int,
    groups: Sequence[tuple[list[int], Mask]],
) -> dict[int, Best]:
    """What each query finds there; all of them while the chunk is in the caches.

    projected: all queries, by the scale of a chunk.
    """
    found: dict[int, Best] = {}
    for members, mask in groups:
        allowed = _selected(mask, chunk)
        if allowed is not None:
            scores, positions = chunk.scan(projected[chunk.scale][members], count, allowed)
            found.update(zip(members, map(Best, positions, scores), strict=True))
    return found


def _selected(mask: Mask, chunk: Chunk | Block) -> Any:
    """FAISS's parameters for the rows of a chunk that a mask lets pass, None where it lets none.

    Kept as long as the mask: making them takes as long as scanning a thousand rows.
    """
    kept = _selections.get(id(mask))
    if kept is None:
        kept = _selections[id(mask)] = {}
        weakref.finalize(mask, _selections.pop, id(mask), None)
    allowed = mask[chunk.first : chunk.first + chunk.count]
    key = chunk.first, len(allowed)
    if key not in kept:
        kept[key] = selecting(allowed) if allowed.any() else None
    return kept[key]


def merged(parts: Sequence[Best], count: int) -> Best:
    """The best `count` of several, at equal scores the earlier row first; rows −1 are dropped."""
    if not parts:
        return _EMPTY
    positions = np.concatenate([part.positions for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    real = positions >= 0
    if not real.all():
        positions, scores = positions[real], scores[real]
    order = np.lexsort((positions, -scores))[:count]
    return Best(positions[order], scores[order])


def sharing(allowed: Sequence[Mask]) -> Iterator[list[int]]:
    """Groups of queries that share one mask object."""
    groups: dict[int, list[int]] = {}
    for query, mask in enumerate(allowed):
        groups.setdefault(id(mask), []).append(query)
    yield from groups.values()


def _shared(work: Callable[[Item], Result], items: Sequence[Item], least: int = 2) -> list[Result]:
    """`work` of every item, in their order: the threads of the pool and this one take one each.

    FAISS shares out queries, not rows, and PyTorch would wait for all of its threads. Here nobody
    waits for a thread that did not wake up in time. least: this thread does fewer items alone.
    """
    left = deque(enumerate(items))
    results: dict[int, Result] = {}

    def take() -> None:
        while left:
            give_way()
            try:
                place, item = left.popleft()
            except IndexError:  # another thread took the last one
                return
            results[place] = work(item)

    def take_elsewhere(cores: set[int]) -> None:
        with suppress(OSError):  # they may have been taken from this process meanwhile
            os.sched_setaffinity(0, cores)
        take()

    helping = min(_cores(), len(items)) - 1 if len(items) >= least else 0
    others = []
    if helping > 0:
        # Linux wakes a thread on the caller's core where the others are busy for a moment, and
        # leaves it there: both would share one core to the end.
        elsewhere = os.sched_getaffinity(0) - {_LIBC.sched_getcpu()}
        others = [
            _threads().submit(copy_context().run, take_elsewhere, elsewhere)
            for _ in range(helping if elsewhere else 0)
        ]
    with one_thread():
        take()
    for other in others:
        if not other.cancel():
            other.result()
    return [results[place] for place in range(len(items))]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), "scan", initializer=partial(faiss.omp_set_num_threads, 1))


@cache
def _cores() -> int:
    return int(faiss.omp_get_max_threads())
