"""Which number type is fast here: measured on this machine in a few milliseconds, never assumed.

With AMX, bf16 on a CPU is several times faster than fp32; with AVX2 only it can be a hundred times
slower. The answer is cached for the life of the process; a caller may override it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import nn

PrecisionName = Literal["auto", "float32", "bfloat16"]
# bf16 rounds to three digits: it must win clearly, not by the noise of one measurement.
_CLEAR_WIN = 1.15
_BF16_CAPABILITY = 8  # of the first GPUs with units for it: Ampere


class Precision(NamedTuple):
    """The dtype for the network's convolutions and products, and the sentence that says why."""

    dtype: torch.dtype
    reason: str

    @property
    def autocast(self) -> bool:
        """Whether the network runs under autocast."""
        return self.dtype != torch.float32


@lru_cache(maxsize=8)
def choose_precision(device: str = "cpu", override: PrecisionName = "auto") -> Precision:
    """Choose the dtype in which a convolution network runs fastest.

    device: "cpu", "cuda" or "cuda:1". override: this dtype instead of a measurement, unless "auto".
    """
    if override != "auto":
        return Precision(getattr(torch, override), f"{override}: set by configuration")
    if device.startswith("cuda"):
        if torch.cuda.get_device_capability(device)[0] >= _BF16_CAPABILITY:
            return Precision(torch.bfloat16, "bfloat16: the GPU has units for it")
        return Precision(torch.float32, "float32: the GPU has no bfloat16 units")
    fp32, bf16 = _seconds(torch.float32), _seconds(torch.bfloat16)
    faster = fp32 / bf16
    if faster >= _CLEAR_WIN:
        return Precision(torch.bfloat16, f"bfloat16: measured {faster:.1f}× as fast as float32")
    return Precision(torch.float32, f"float32: bfloat16 measured {faster:.2f}× as fast")


def _seconds(dtype: torch.dtype) -> float:
    """The best of three runs of a 3×3 convolution as in a ResNet, in seconds."""
    with torch.inference_mode():
        convolution = nn.Conv2d(64, 64, 3, padding=1, dtype=dtype)
        images = torch.randn(4, 64, 32, 16, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        return min(_time(lambda: convolution(images)) for _ in range(3))


def _time(call: Callable[[], object]) -> float:
    call()  # the first call of a shape builds its kernel
    start = time.perf_counter()
    for _ in range(3):
        call()
    return time.perf_counter() - start
