"""Image → tensor: one function for evaluation and service, its constants also for training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from model.config import CMTConfig

if TYPE_CHECKING:
    from torch import Tensor

# ImageNet's channel means and deviations of values in [0, 1] (torchvision's convention).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    """A PIL image → uint8 array height×width×3; gray (IR) images are replicated to 3 channels."""
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def normalise(images: Tensor) -> Tensor:
    """uint8 …×3×H×W → float32, scaled to [0, 1] and standardised by ImageNet's statistics."""
    import torch  # here, because `model` itself must import without torch: see model/__init__.py

    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def preprocess(image: Image.Image, config: CMTConfig) -> Tensor:
    """A crop → 3×H×W float32 at the configuration's input size, as `CMT.embed` takes it."""
    return preprocess_all([image], config)[0]


def preprocess_all(images: Sequence[Image.Image], config: CMTConfig) -> Tensor:
    """B crops → B×3×H×W float32 at the configuration's input size.

    By NumPy, on this thread alone: sharing out so little work among PyTorch's threads would have
    them wait for more, awake, on cores that a service needs.
    """
    import torch

    height, width = config.input_height, config.input_width
    batch = np.empty((len(images), 3, height, width), np.float32)
    values = _values()
    for image, planes in zip(images, batch, strict=True):
        pixels = resize(image, height, width)
        for channel in range(3):
            np.take(values[channel], pixels[:, :, channel], out=planes[channel], mode="clip")
    return torch.from_numpy(batch)


@cache
def _values() -> np.ndarray:
    """`normalise` of every value that a channel's pixel can have, 3×256."""
    import torch

    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    return normalise(levels)[:, 0].numpy()
