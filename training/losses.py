"""The four losses of CMT (§3.1-3.3), as functions of a batch; every one returns a scalar.

Axes: B batch, P parts, D channels, C identities of the training set. A batch holds K images of
each of its N identities in each modality, in any order.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.modulation import Modulation, squared_modulated_distance

ModulationForm = Literal["batch_hard", "mean_triplet", "softmax"]


def identity_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """L_cls (10): cross-entropy of one classifier per part, summed over parts.

    (10) adds the mean over the visible images and the mean over the infrared ones. Here it is one
    mean over both, which are equally many: half of (10). `identity: 2` in a recipe's weights gives
    (10) to the letter, and doubles the share of L_ID's first term.

    logits B×P×C, labels B.
    """
    parts = logits.shape[1]
    targets = labels.repeat_interleave(parts)
    mean = functional.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=label_smoothing)
    return parts * mean


class Centres(NamedTuple):
    """Mean per identity and modality: rgb and ir are N×F, labels N ascending."""

    rgb: Tensor
    ir: Tensor
    labels: Tensor


def modality_centres(features: Tensor, labels: Tensor, is_ir: Tensor) -> Centres:
    """Equation (6): features B×F → the centroid of every identity in each modality."""
    identities, member = torch.unique(labels, return_inverse=True)
    one_hot = functional.one_hot(member, len(identities)).to(features.dtype).T  # N×B

    def mean(of: Tensor) -> Tensor:
        chosen = one_hot * of
        return (chosen @ features) / chosen.sum(1, keepdim=True)

    return Centres(mean(~is_ir), mean(is_ir), identities)


def hetero_centre_triplet(
    features: Tensor, labels: Tensor, is_ir: Tensor, margin: float = 0.3
) -> Tensor:
    """L_hc_tri (11): features B×F; batch-hard over all 2N centres.

    Every centre is an anchor; its positive is the same person's centre in the other modality, its
    negative the nearest centre of anyone else in either modality (Liu et al., HCT).
    """
    centres = modality_centres(features, labels, is_ir)
    anchors = torch.cat([centres.rgb, centres.ir])  # 2N×F
    owners = centres.labels.repeat(2)
    distances = _distances(anchors)
    same = owners[:, None] == owners
    positive = distances.masked_fill(~same, 0).amax(1)
    negative = distances.masked_fill(same, torch.inf).amin(1)
    return functional.relu(margin + positive - negative).mean()


def modality_consistency(
    compensated: Tensor,
    features: Tensor,
    labels: Tensor,
    is_ir: Tensor,
    *,
    centroid_gradient: bool = False,
) -> Tensor:
    """L_cyc^R + L_cyc^I (7)(8): compensated F̂ against centroids of the real raw F, both B×P×D.

    F̂^R comes from IR images and is drawn to the person's RGB centroid, F̂^I from RGB images to the
    IR centroid. Each is the norm over all P·D numbers, averaged over the images of its modality.
    The centroids are targets without gradient: with `centroid_gradient` the network lowers the loss
    by shrinking every feature.
    """
    real = features.flatten(1) if centroid_gradient else features.detach().flatten(1)
    centres = modality_centres(real, labels, is_ir)
    member = torch.searchsorted(centres.labels, labels)
    target = torch.where(is_ir[:, None], centres.rgb[member], centres.ir[member])
    error = (compensated.flatten(1) - target).norm(dim=1)
    loss: Tensor = error[is_ir].mean() + error[~is_ir].mean()
    return loss


def modulation_discriminative(
    embedding: Tensor,
    modulation: Modulation,
    labels: Tensor,
    is_ir: Tensor,
    *,
    form: ModulationForm = "batch_hard",
    margin: float = 0.3,
    temperature: float = 0.1,
    across_modalities: bool = False,
) -> Tensor:
    """L_mod (14): every sample X is a query, the others Y are modulated by X's γ, β.

    embedding B×P×D, modulation B×D each. The distance is the one ranked at test time. `form`:
    "batch_hard" takes the farthest positive and nearest negative of each query, "mean_triplet" all
    triplets, "softmax" is cross-entropy over −D²/temperature (each positive against all negatives).
    across_modalities: only images of the other modality are candidates, as in the test protocols.
    """
    squared = squared_modulated_distance(embedding, embedding, modulation)  # B×B
    candidate = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if across_modalities:
        candidate &= is_ir[:, None] != is_ir
    same = (labels[:, None] == labels) & candidate
    other = (labels[:, None] != labels) & candidate
    if form == "softmax":
        scores = -squared / temperature
        negatives = scores.masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
        losses = functional.softplus(negatives - scores)  # −log of s⁺ / (s⁺ + Σ s⁻)
        return losses[same].mean()
    distances = squared.clamp(min=1e-12).sqrt()
    if form == "batch_hard":
        positive = distances.masked_fill(~same, 0).amax(1)
        negative = distances.masked_fill(~other, torch.inf).amin(1)
        return functional.relu(margin + positive - negative).mean()
    gaps = margin + distances[:, :, None] - distances[:, None, :]  # query × positive × negative
    return functional.relu(gaps[same[:, :, None] & other[:, None, :]]).mean()


def modulation_at_equal_distances(
    form: ModulationForm,
    identities: int,
    images: int,
    *,
    margin: float = 0.3,
    across_modalities: bool = False,
) -> float:
    """What `modulation_discriminative` is where all distances are equal: modulation collapsed.

    For a batch of `identities` N with `images` K in each modality.
    """
    if form == "softmax":
        negatives = (identities - 1) * images * (1 if across_modalities else 2)
        return math.log(1 + negatives)
    return margin


def _distances(features: Tensor) -> Tensor:
    """Euclidean distances among rows, with a finite gradient on the diagonal: M×F → M×M."""
    squared_norms = features.square().sum(1)
    squared = squared_norms[:, None] + squared_norms - 2 * features @ features.T
    return squared.clamp(min=1e-12).sqrt()
