"""Pictures without anybody in them, by which number types are compared on a machine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from model.config import CMTConfig


def smooth_pictures(config: CMTConfig, count: int, seed: int) -> Tensor:
    """Smooth blotches at the network's input size, count×H×W×3 uint8, the same every time."""
    coarse = torch.randn(count, 3, 12, 6, generator=torch.Generator().manual_seed(seed))
    size = (config.input_height, config.input_width)
    smooth = functional.interpolate(coarse, size=size, mode="bilinear").permute(0, 2, 3, 1)
    return (128 + 64 * smooth).clamp(0, 255).byte().contiguous()
