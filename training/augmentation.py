"""Augmentation of a batch of uint8 images on tensors, each image with its own draw.

The paper's (§4.2): random crop with zero padding, horizontal flip, random erasing. The others are
off in its recipe and serve training without pretrained weights. So that the network does not
memorise the colors of clothes, visible images become gray: by random channel weights, or by one
channel in the place of all three (channel exchange: Ye et al., "Channel Augmented Joint Learning
for Visible-Infrared Recognition", ICCV 2021). So that it does not rely on the exposure, brightness
and contrast vary in both modalities.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from model.pixels import normalise


class AugmentationConfig(BaseModel):
    """Probabilities in [0, 1], except for:

    padding: rows and columns of zeros on every side, as a share of the height (10 of 288 rows is
        common).
    erasing_area: least and largest share of the image that is erased.
    brightness, contrast: largest relative change, drawn for every image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    padding: float = Field(default=10 / 288, ge=0, le=0.5)
    flip: float = Field(default=0.5, ge=0, le=1)
    erasing: float = Field(default=0.5, ge=0, le=1)
    erasing_area: tuple[float, float] = (0.02, 0.4)
    gray: float = Field(default=0.0, ge=0, le=1)
    channel_exchange: float = Field(default=0.0, ge=0, le=1)
    brightness: float = Field(default=0.0, ge=0, lt=1)
    contrast: float = Field(default=0.0, ge=0, lt=1)


class Draws:
    """Random numbers in [0, 1) for the images of a batch, each call a new draw.

    generator: on the device of the images. A process that has only some of the batch's images says
    how many there are in all (`total`) and which are its own (`rows`): it draws for all of them,
    and every image gets what it would get in one process.
    """

    def __init__(self, generator: torch.Generator, total: int, rows: Tensor | None = None) -> None:
        self._generator = generator
        self._total = total
        self._rows = rows

    def uniform(self, *shape: int) -> Tensor:
        """B×shape."""
        device = self._generator.device
        drawn = torch.rand(self._total, *shape, generator=self._generator, device=device)
        return drawn if self._rows is None else drawn[self._rows]


def augment(
    images: Tensor,
    is_ir: Tensor,
    config: AugmentationConfig,
    generator: torch.Generator,
    *,
    total: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """uint8 B×3×H×W and is_ir B → float32 B×3×H×W, normalised as `model.preprocess` does.

    Everything is drawn and computed on the device of images, is_ir and generator. total, rows: see
    `Draws`.
    """
    draws = Draws(generator, total or len(images), rows)
    pixels = _crop_and_flip(images, config, draws).float()
    if config.gray:
        pixels = _gray(pixels, is_ir, config.gray, draws)
    if config.channel_exchange:
        pixels = _exchange_channels(pixels, is_ir, config.channel_exchange, draws)
    if config.contrast:
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        pixels = (mean + (pixels - mean) * _jitter(config.contrast, draws)).clamp(0, 255)
    if config.brightness:
        pixels = (pixels * _jitter(config.brightness, draws)).clamp(0, 255)
    return _erase(normalise(pixels), config, draws)


def _jitter(span: float, draws: Draws) -> Tensor:
    """One factor per image, uniform in 1 ± span: B×1×1×1."""
    return (1 + span * (2 * draws.uniform() - 1))[:, None, None, None]


def _crop_and_flip(images: Tensor, config: AugmentationConfig, draws: Draws) -> Tensor:
    """A window of the image's own size out of the zero-padded image, mirrored by chance."""
    count, _, height, width = images.shape
    pad = round(config.padding * height)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left = ((draws.uniform() * (2 * pad + 1)).long() for _ in range(2))
    rows = top[:, None] + torch.arange(height, device=images.device)  # B×H
    columns = left[:, None] + torch.arange(width, device=images.device)  # B×W
    flipped = draws.uniform() < config.flip
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    batch = torch.arange(count, device=images.device)[:, None, None]
    # Advanced indexing puts the channels last: B×H×W×3.
    window = padded[batch, :, rows[:, :, None], columns[:, None, :]]
    return window.permute(0, 3, 1, 2)


def _gray(pixels: Tensor, is_ir: Tensor, probability: float, draws: Draws) -> Tensor:
    weights = draws.uniform(3)
    weights = weights / weights.sum(1, keepdim=True)
    gray = (pixels * weights[:, :, None, None]).sum(1, keepdim=True).expand_as(pixels)
    chosen = (draws.uniform() < probability) & ~is_ir
    return torch.where(chosen[:, None, None, None], gray, pixels)


def _exchange_channels(pixels: Tensor, is_ir: Tensor, probability: float, draws: Draws) -> Tensor:
    """One channel, drawn for each image, in the place of all three."""
    channel = (draws.uniform() * 3).long()
    images = torch.arange(len(pixels), device=pixels.device)
    single = pixels[images, channel][:, None].expand_as(pixels)
    chosen = (draws.uniform() < probability) & ~is_ir
    return torch.where(chosen[:, None, None, None], single, pixels)


def _erase(images: Tensor, config: AugmentationConfig, draws: Draws) -> Tensor:
    """A random rectangle becomes 0, the mean colour (Zhong et al., Random Erasing)."""
    _, _, height, width = images.shape
    smallest, largest = config.erasing_area
    area = (smallest + (largest - smallest) * draws.uniform()) * height * width
    # Aspect ratios between 0.3 and 1/0.3, uniform in the logarithm.
    aspect = torch.exp((2 * draws.uniform() - 1) * torch.tensor(0.3).log().abs())
    tall = (area * aspect).sqrt().clamp(max=height)
    wide = (area / aspect).sqrt().clamp(max=width)
    top = draws.uniform() * (height - tall)
    left = draws.uniform() * (width - wide)
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    in_rows = (y >= top[:, None]) & (y < (top + tall)[:, None])  # B×H
    in_columns = (x >= left[:, None]) & (x < (left + wide)[:, None])  # B×W
    chosen = draws.uniform() < config.erasing
    hole = in_rows[:, :, None] & in_columns[:, None, :] & chosen[:, None, None]
    return images.masked_fill(hole[:, None], 0.0)
