"""Image → tensor: one function for evaluation and service, its constants also for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:  # the processes that decode load neither
    from torch import Tensor

    from model.config import CMTConfig

# ImageNet's channel means and deviations of values in [0, 1] (torchvision's convention).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


Pixels = Image.Image | np.ndarray
"""A PIL image, or uint8 H×W×3."""


def resize(image: Pixels, height: int, width: int) -> np.ndarray:
    """Any image → uint8 array height×width×3; gray (IR) images are replicated to 3 channels."""
    if isinstance(image, np.ndarray):
        if image.shape == (height, width, 3):
            return image
        image = Image.fromarray(image)
    if image.mode != "RGB":  # Pillow copies an image that already fits, here and below
        image = image.convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def normalise(images: Tensor) -> Tensor:
    """uint8 …×3×H×W → float32, scaled to [0, 1] and standardised by ImageNet's statistics."""
    import torch  # here, because `model` itself must import without torch: see model/__init__.py

    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def preprocess(image: Pixels, config: CMTConfig) -> Tensor:
    """A crop → 3×H×W float32 at the configuration's input size, as `CMT.embed` takes it."""
    return normalise(pixels_of([image], config)[0].permute(2, 0, 1))


def pixels_of(images: Sequence[Pixels], config: CMTConfig) -> Tensor:
    """B crops → B×H×W×3 uint8 at the configuration's input size."""
    import torch

    size = config.input_height, config.input_width
    return torch.from_numpy(np.stack([resize(image, *size) for image in images]))
