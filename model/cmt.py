"""The whole network: the Cross-Modality Transformer (CMT, ECCV 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.alignment import ModalityAlignment
from model.backbone import TwoStreamResNet
from model.config import MODALITIES, CMTConfig, Modality
from model.modulation import (
    FloatArray,
    Modulation,
    ParameterGenerator,
    Strength,
    ranking_distance,
)
from model.parts import PartFeatures

_LEAST_LENGTH = 1e-12  # as `torch.nn.functional.normalize` has it


class CMTOutput(NamedTuple):
    """What the network computes for B images, all B×P×D.

    features F, raw part features; compensated F̂, those of the image's missing modality (None
    without modality alignment); complete R or I = F + F̂ (5); embedding, the form that is ranked.
    """

    features: Tensor
    compensated: Tensor | None
    complete: Tensor
    embedding: Tensor

    def float(self) -> CMTOutput:
        """Convert all to fp32, whatever dtype autocast gave them."""
        compensated = None if self.compensated is None else self.compensated.float()
        return CMTOutput(
            self.features.float(), compensated, self.complete.float(), self.embedding.float()
        )


class CMT(nn.Module):
    """Images of either modality → part representations, and a query's γ, β.

    weights: None starts from random initialisation, "imagenet" from torchvision's (needs a
    network), a path from a local file of them; see `TwoStreamResNet.load_imagenet`.
    strength: of the modulation, None for γ and β as trained; `load_checkpoint` sets a calibrated
    checkpoint's.
    """

    strength: Strength | None = None

    def __init__(self, config: CMTConfig, *, weights: str | Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = TwoStreamResNet(config)
        self.parts = PartFeatures(self.backbone.channels, config.parts, config.dim, config.gem_p)
        self.alignment = ModalityAlignment(config) if config.modality_alignment else None
        self.generator_gamma: ParameterGenerator | None = None
        self.generator_beta: ParameterGenerator | None = None
        if config.instance_alignment:
            # A unit vector of P·D numbers has entries of about 1/√(P·D): see ParameterGenerator.
            scale = config.embedding_size**0.5 if config.normalise_test else 1.0
            sizes = config.dim, config.hidden_generator
            self.generator_gamma = ParameterGenerator(*sizes, start=1.0, input_scale=scale)
            self.generator_beta = ParameterGenerator(*sizes, start=0.0, input_scale=scale)
        if weights is not None:
            self.backbone.load_imagenet(weights)

    def forward(
        self,
        images: Tensor,
        modality: Modality | Sequence[Modality],
        *,
        detached_compensation: bool = False,
    ) -> CMTOutput:
        """Compute all representations of B images.

        images: B×3×H×W, normalised; H may differ from the configuration's (training in stages), if
        the parts divide H/16. modality: one for all, or B of them. detached_compensation: gradients
        of F̂ stop at F, from which it is computed. Raises ValueError for another modality than
        "rgb" and "ir", or another number of them.
        """
        is_ir = self._is_ir(images, modality)
        features = self.parts(self.backbone(images, is_ir))
        source = features.detach() if detached_compensation else features
        compensated = None if self.alignment is None else self.alignment(source, is_ir)
        complete = features if compensated is None else features + compensated  # (5)
        return CMTOutput(features, compensated, complete, self.ranked_form(complete))

    def ranked_form(self, complete: Tensor) -> Tensor:
        """B×P×D → B×P×D: scaled to unit norm over P·D where the configuration says so."""
        if not self.config.normalise_test:
            return complete
        return functional.normalize(complete.flatten(1), dim=1).view_as(complete)

    def represent(self, images: Tensor, modality: Modality | Sequence[Modality]) -> CMTOutput:
        """What is stored and ranked: `forward`, or where the configuration has `mirror` its mean.

        Of the crop and its mirror image, computed in one batch of 2·B; the mean is then brought
        into the ranked form.
        """
        if not self.config.mirror:
            return self(images, modality)  # type: ignore[no-any-return]
        of_both = modality if isinstance(modality, str) else [*modality, *modality]
        seen = self(torch.cat([images, images.flip(3)]), of_both)

        def mean(both: Tensor) -> Tensor:
            return both.view(2, -1, *both.shape[1:]).mean(0)

        complete = mean(seen.complete)
        return CMTOutput(
            mean(seen.features),
            None if seen.compensated is None else mean(seen.compensated),
            complete,
            self.ranked_form(complete),
        )

    @torch.inference_mode()
    def embed(self, images: Tensor, modality: Modality | Sequence[Modality]) -> Tensor:
        """B×3×H×W → B×P×D in fp32: the complete representation, as it is stored and ranked.

        The mean with that of the mirror image where the configuration says so.
        Raises ValueError where the images are not of the configuration's size (see `preprocess`).
        """
        expected = (3, self.config.input_height, self.config.input_width)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected B×3×{expected[1]}×"
                f"{expected[2]}; pass what model.preprocess returns"
            )
        return self.represent(images, modality).embedding.float()

    def modulation(self, x: Tensor) -> Modulation:
        """Equation (12) at the network's `strength`: embeddings B×P×D → γ, β of B×D.

        Without instance alignment 1 and 0.
        """
        if self.generator_gamma is None or self.generator_beta is None:
            return Modulation.identity(x.shape[0], x.shape[2], device=x.device, dtype=x.dtype)
        pooled = x.mean(dim=1)
        trained = Modulation(self.generator_gamma(pooled), self.generator_beta(pooled))
        return trained if self.strength is None else self.strength.applied(trained)

    def distance(self, x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
        """Q×P×D against N×P×D under x's modulation → Q×N, in the configuration's metric."""
        return ranking_distance(x, y, modulation, self.config.metric)

    def _is_ir(self, images: Tensor, modality: Modality | Sequence[Modality]) -> Tensor | bool:
        given = {modality} if isinstance(modality, str) else set(modality)
        if not given <= set(MODALITIES):
            raise ValueError(
                f"unknown modality {sorted(given - set(MODALITIES))[0]!r}; use 'rgb' or 'ir'"
            )
        if isinstance(modality, str):
            return modality == "ir"
        if len(modality) != len(images):
            raise ValueError(f"{len(modality)} modalities for {len(images)} images; give one each")
        if len(given) == 1:  # a uniform batch needs no sorting, and no empty stem batch
            return "ir" in given
        return torch.tensor([m == "ir" for m in modality], device=images.device)


def ranked_mean(seen: FloatArray, *, normalise: bool) -> FloatArray:
    """Representations V×B×P×D of V pictures each → B×P×D: what `CMT.represent` does, in NumPy.

    normalise: as the configuration's `normalise_test`.
    """
    mean: FloatArray = seen.sum(0) / len(seen)
    if not normalise:
        return mean
    flat = mean.reshape(len(mean), -1)
    lengths = np.maximum(np.sqrt(np.vecdot(flat, flat)), _LEAST_LENGTH)
    unit: FloatArray = mean / lengths[:, None, None]
    return unit


class Modulator:
    """`modulation_of` for a network that answers one query after the other.

    In NumPy, whose steps begin several times as fast as PyTorch's, and a query by itself: what else
    is in the batch changes no digit.
    """

    def __init__(self, model: CMT) -> None:
        self._generators = None
        self._strength = model.strength
        if model.generator_gamma is not None and model.generator_beta is not None:
            self._generators = model.generator_gamma.in_numpy(), model.generator_beta.in_numpy()

    def __call__(self, x: Tensor) -> Modulation:
        """γ, β to rank queries Q×P×D on the CPU with: Q×D each."""
        if self._generators is None:
            return Modulation.identity(x.shape[0], x.shape[2])
        pooled = x.numpy().mean(1)
        gamma, beta = (generated(pooled) for generated in self._generators)
        if self._strength is not None:
            gamma, beta = self._strength.of(gamma, beta)
        return Modulation(torch.from_numpy(gamma), torch.from_numpy(beta))


@torch.inference_mode()
def modulation_of(model: CMT, x: Tensor) -> Modulation:
    """γ, β to rank queries Q×P×D with: Q×D each, fp32 on the CPU, wherever the network is."""
    device = next(model.parameters()).device
    return Modulation(*(part.float().cpu() for part in model.modulation(x.to(device))))
