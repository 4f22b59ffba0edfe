"""Equation (15) on a batch: images → loss, and the values that are logged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import CMT, CMTOutput, Modality
from model.precision import Precision
from training.classifiers import PartClassifiers
from training.distributed import Share
from training.losses import (
    hetero_centre_triplet,
    identity_loss,
    modality_consistency,
    modulation_discriminative,
)
from training.recipe import LossWeights, Recipe


class Labels(NamedTuple):
    """Of the global batch: class of every image (0-based), and whether it is infrared."""

    people: Tensor
    is_ir: Tensor


class Objective(nn.Module):
    """The network and its identity classifiers, with the loss as the result of `forward`.

    One module, because DDP hooks into a module's forward and must see all that is trained.

    heads: identity classifiers by the output that they classify (a field of CMTOutput):
        "complete" always, "features" where the recipe weighs `identity_features` and F is not
        complete by itself.
    """

    def __init__(self, recipe: Recipe, model: CMT, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.recipe = recipe
        self.model = model
        outputs = ["complete"]
        if recipe.model.modality_alignment and any(
            stage.weights.identity_features for stage in recipe.stages
        ):
            outputs.append("features")
        # The same for a seed, whichever modules the network has.
        torch.manual_seed(seed)
        self.heads = {
            name: PartClassifiers(recipe.model.parts, recipe.model.dim, classes) for name in outputs
        }
        self.classifiers = nn.ModuleDict(self.heads)  # registers them
        self.precision = Precision(torch.float32, "float32: the default")

    def forward(
        self,
        images: Tensor,
        modalities: list[Modality],
        share: Share,
        labels: Labels,
        weights: LossWeights,
        classes: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation (15) over the whole batch, and its terms and other figures, detached.

        images, modalities: this process's share of the batch, B'×3×H×W and B'.
        labels: of the whole batch, B.
        classes: only the first of them take part (a stage's `identities`).
        """
        with torch.autocast(
            images.device.type, self.precision.dtype, enabled=self.precision.autocast
        ):
            output = self.model(
                images,
                modalities,
                detached_compensation=not self.recipe.compensation_gradient,
            )
        # Losses in fp32: distances and centroids are differences of near numbers.
        return self._loss(_gathered(output.float(), share), labels, weights, classes)

    def _loss(
        self, output: CMTOutput, labels: Labels, weights: LossWeights, classes: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        recipe, (people, is_ir) = self.recipe, labels
        terms: dict[str, tuple[float, Tensor]] = {}
        figures: dict[str, Tensor] = {}

        logits = self.heads["complete"](output.complete)[:, :, :classes]
        identity = identity_loss(logits, people, recipe.label_smoothing)
        terms["identity"] = weights.identity, identity
        if "features" in self.heads:
            of_features = self.heads["features"](output.features)[:, :, :classes]
            raw = identity_loss(of_features, people, recipe.label_smoothing)
            terms["identity_features"] = weights.identity_features, raw
        flat = output.embedding.flatten(1)
        triplet = hetero_centre_triplet(flat, people, is_ir, recipe.margin)
        terms["triplet"] = weights.triplet, triplet
        if weights.triplet_parts:
            per_part = [
                hetero_centre_triplet(part, people, is_ir, recipe.margin)
                for part in output.embedding.unbind(1)
            ]
            terms["triplet_parts"] = weights.triplet_parts, torch.stack(per_part).mean()
        if output.compensated is not None:
            consistency = modality_consistency(
                output.compensated,
                output.features,
                people,
                is_ir,
                centroid_gradient=recipe.centroid_gradient,
            )
            terms["consistency"] = weights.consistency, consistency
        modulates = recipe.model.instance_alignment or recipe.modulation_without_generators
        if modulates and weights.modulation:
            gamma, beta = modulation = self.model.modulation(output.embedding)
            loss = modulation_discriminative(
                output.embedding,
                modulation,
                people,
                is_ir,
                form=recipe.modulation_form,
                margin=recipe.margin,
                temperature=recipe.modulation_temperature,
                across_modalities=recipe.modulation_across,
            )
            terms["modulation"] = weights.modulation, loss
            beta_norm = beta.norm(dim=1).mean() * recipe.model.parts**0.5
            figures["gamma_mean"] = gamma.mean()
            figures["gamma_std"] = gamma.std(dim=0).mean()
            figures["beta_share"] = beta_norm / flat.norm(dim=1).mean()
        figures["accuracy"] = (logits.sum(1).argmax(1) == people).float().mean()
        figures["feature_norm"] = output.features.flatten(1).norm(dim=1).mean()
        # A term of weight 0 is logged and has no gradient, not even 0 · NaN.
        total = torch.stack([weight * term for weight, term in terms.values() if weight]).sum()
        values = {name: term for name, (_, term) in terms.items()} | figures | {"loss": total}
        return total, {name: value.detach() for name, value in values.items()}


def _gathered(output: CMTOutput, share: Share) -> CMTOutput:
    """The outputs of all processes, in the order of the global batch."""
    present = {name: value for name, value in output._asdict().items() if value is not None}
    whole = share.gather(torch.stack(list(present.values()), dim=1)).unbind(1)
    return output._replace(**dict(zip(present, whole, strict=True)))
