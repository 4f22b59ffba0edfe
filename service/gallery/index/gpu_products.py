"""Best inner products with rows that lie on a GPU: by kernels of Triton, elsewhere by PyTorch's.

Matrix units multiply fp16 and add in fp32. The rows are fp16; a query is given as two fp16 halves,
which together have fp32's digits. What costs time beside reading the rows are launches and copies:
there are as many as with a single chunk, and a mask is copied once, as long as it stays the same.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from service.gallery.index.chunks import Chunk, Mask
from service.kit.device_loss import is_device_lost
from service.kit.memory import is_out_of_memory

log = logging.getLogger(__name__)

_LOW = 2.0**11  # the low half of a number in two fp16: its distance in scale from the high half
_SCORES = 1 << 24  # that PyTorch holds at once: 64 MiB
_masks: dict[tuple[int, torch.device], Tensor] = {}


def best(
    chunks: Sequence[Chunk], dim: int, w: Tensor, count: int, allowed: Sequence[Mask]
) -> tuple[Tensor, Tensor]:
    """Best `count` of each of Q queries → scores and positions Q×count, −inf where there are none.

    w: Q×(P+1)D float64, unscaled, on the CPU. allowed: one mask per query over the first rows;
    rows beyond it do not exist. Returns before the GPU is done.
    """
    device = chunks[0].z.device
    most = max(map(len, allowed))
    filled = [(c, min(c.count, most - c.first)) for c in chunks if min(c.count, most - c.first) > 0]
    if not filled:
        nothing = torch.empty(len(w), 0, device=device)
        return nothing, nothing.long()
    masks = [_resident(mask, device) for mask in allowed]
    kernels = kernels_on(device)
    if kernels is None:
        return _by_torch(filled, dim, w, count, masks)
    y, s = (halves(part.float()) for part in (w[:, :-dim], w[:, -dim:]))
    queries = torch.cat([y[0], s[0]], 1).to(device), torch.cat([y[1], s[1]], 1).to(device)
    scores, positions = kernels.best(
        *zip(*filled, strict=True), queries, masks, count, (w.shape[1] - dim, dim)
    )
    return scores, positions


def kernels_on(device: torch.device) -> ModuleType | None:
    """The kernels, or None where Triton is missing or cannot build them: it calls a C compiler.

    None, too, as long as the device has no memory to try them with.
    """
    try:
        return None if device.type == "cpu" else _kernels(device.index or 0)
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise


@cache
def _kernels(number: int) -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from service.gallery.index import kernels

    device = torch.device("cuda", number)
    try:
        row = torch.zeros(1, 16, dtype=torch.float16, device=device)
        there = torch.tensor([[row.data_ptr(), 0]], device=device)
        built = bool((kernels.gather(there, 16) == row).all())
    except Exception as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise  # says nothing about Triton
        reason = str(error).partition("\n")[0]
        log.warning("Triton builds no kernels (%s): a search takes more launches", reason)
        return None
    return kernels if built else None


def halves(w: Tensor) -> tuple[Tensor, Tensor]:
    """w Q×Z as two fp16 numbers each and a power of two: w ≈ size·(high + low/2¹¹).

    → 2Q×Z, high halves first, and size Q×1. Off by at most 2⁻²²·|w|, and 2⁻³⁶ of the row's largest
    number.
    """
    largest = w.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    size = torch.exp2(torch.ceil(torch.log2(largest)))
    scaled = w / size
    high = scaled.half()
    low = ((scaled - high.float()) * _LOW).half()
    return torch.cat([high, low]), size


def _resident(mask: Mask, device: torch.device) -> Tensor:
    """The mask on the device, for as long as it lives here."""
    key = id(mask), device
    there = _masks.get(key)
    if there is None:
        there = _masks[key] = torch.from_numpy(mask).to(device)
        weakref.finalize(mask, _masks.pop, key, None)
    return there


def _by_torch(
    filled: Sequence[tuple[Chunk, int]], dim: int, w: Tensor, count: int, masks: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """As the kernels do, with a matrix product for each chunk."""
    device = masks[0].device
    queries: dict[float, tuple[Tensor, Tensor]] = {}
    found = []
    for strip in _strips(filled, _SCORES // (2 * len(w))):
        first, scale = strip[0][0].first, strip[0][0].scale
        if scale not in queries:
            both, size = halves(strip[0][0].projected(w, dim))
            queries[scale] = both.to(device), size.to(device)
        both, size = queries[scale]
        products = [torch.mm(both, c.z[:rows].T, out_dtype=torch.float32) for c, rows in strip]
        high, low = torch.cat(products, 1).chunk(2)
        scores = torch.add(high, low, alpha=1 / _LOW).mul_(size)
        scores.masked_fill_(_barred(masks, first, first + scores.shape[1]), -torch.inf)
        scores, kept = scores.topk(min(count, scores.shape[1]))
        found.append((scores, kept + first))
    if len(found) == 1:
        return found[0]
    scores, positions = (torch.cat(of, 1) for of in zip(*found, strict=True))
    scores, kept = scores.topk(min(count, scores.shape[1]))
    return scores, positions.gather(1, kept)


def _strips(filled: Sequence[tuple[Chunk, int]], most: int) -> Iterator[list[tuple[Chunk, int]]]:
    """Chunks of one scale whose rows follow each other, with up to `most` rows, or one chunk."""
    strip: list[tuple[Chunk, int]] = []
    for chunk, rows in filled:
        total = sum(of for _, of in strip)
        if strip and (
            total + rows > most
            or chunk.scale != strip[0][0].scale
            or chunk.first != strip[0][0].first + total
        ):
            yield strip
            strip = []
        strip.append((chunk, rows))
    yield strip


def _barred(masks: Sequence[Tensor], start: int, end: int) -> Tensor:
    """Which of the rows `start` … `end` a query may not see: 1×rows if all have one mask, or Q×."""
    shared = list({id(mask): mask for mask in masks}.values())
    rows = [functional.pad(m[start:end], (0, end - start - len(m[start:end]))) for m in shared]
    places = {id(mask): place for place, mask in enumerate(shared)}
    barred = ~torch.stack(rows)
    if len(shared) == 1:
        return barred
    return barred[torch.tensor([places[id(mask)] for mask in masks], device=barred.device)]
