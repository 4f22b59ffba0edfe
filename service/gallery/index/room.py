"""Room for features: what is free on a device and on the host, and how many items that is.

Enrolling, the index's upkeep and `cmt doctor` ask here, so that all of them agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from service.gallery.index.byte_codes import code_bytes
from service.gallery.index.recall_index import IVF_FROM, index_bytes
from service.kit.host_memory import available_memory, total_memory
from service.kit.memory import is_out_of_memory

# Of a device's memory this share, and so much at most, stays free of features: the network's
# batches and the scores of a search need it, and other libraries' first calls.
_DEVICE_SHARE = 1 / 8
_DEVICE_RESERVE = 4 << 30
_HOST_RESERVE = 256 << 20  # decoders, requests and the page cache of the database need it
_kept_free = 0  # of the host's memory besides, see `keep_free`
# A row of the filter columns, which have up to twice as many rows as there are items.
_COLUMN_BYTES = 2 * 41
_FEWER = 8  # what is computed at once is divided by this where memory is short

Result = TypeVar("Result")


class NoRoom(MemoryError):  # noqa: N818
    """Neither the device nor the host has memory for more features."""


def device_room(device: torch.device) -> int:
    """Bytes that features may still take on a CUDA device."""
    free, total = torch.cuda.mem_get_info(device)
    # What PyTorch keeps for its next tensors is used by ours.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept - min(_DEVICE_RESERVE, int(_DEVICE_SHARE * total))


def host_room() -> int:
    """Bytes that features may still take in the host's memory."""
    return available_memory() - _HOST_RESERVE - _kept_free


def keep_free(share: float) -> None:
    """Have this process leave a share of the host's memory free, besides its usual reserve."""
    global _kept_free
    _kept_free = int(share * total_memory())


@dataclass(frozen=True)
class Capacity:
    """How many items fit into the memory that is free now. on_device: None without a GPU."""

    on_device: int | None
    on_host: int


def capacity(width: int, device: str) -> Capacity:
    """What fits beside what is there already. width: of a lifted vector, (P+1)·D.

    A gallery on a GPU has neither codes nor a FAISS index beside it; one on the host has codes, and
    from 200,000 on an index.
    """
    features = feature_bytes(1, width)
    host = max(0, host_room())
    if torch.device(device).type == "cpu":
        each = features + _COLUMN_BYTES + code_bytes(1, width)
        plain = host // each
        indexed = host // (each + index_bytes("IVF-SQ8", 1, width))
        return Capacity(None, indexed if plain >= IVF_FROM else plain)
    there = max(0, device_room(torch.device(device)))
    return Capacity(there // features, host // (features + _COLUMN_BYTES))


def feature_bytes(rows: int, width: int) -> int:
    """Memory of so many lifted vectors in fp16."""
    return 2 * width * rows


def with_less(
    compute: Callable[[torch.device, int], Result],
    device: torch.device,
    most: int,
    least: int = 256,
) -> Result:
    """`compute(device, most)`; where memory runs out for fewer at once, at last on the host.

    most: how many rows or queries are computed at once. least: with so few there is no third try.
    """
    while device.type != "cpu":
        try:
            return compute(device, most)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Not in the handler: it holds the tensors of what failed.
        torch.cuda.empty_cache()
        if most <= least:
            break
        most = max(least, most // _FEWER)
    return compute(torch.device("cpu"), most)
