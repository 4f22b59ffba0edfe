"""The part classifiers of L_ID: training alone needs them, a checkpoint does not hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from model import CMT, Modality
from model.pixels import normalise
from training.losses import identity_loss

# For `imprint`: how many images of a person in each modality make the mean, and which scales are
# tried, in units of 1 / variance of a part's features.
_EXEMPLARS = 4
_SCALES = tuple(2.0**k for k in range(-3, 9))
_BATCH = 128


class PartClassifiers(nn.Module):
    """One linear identity classifier per part: B×P×D → logits B×P×C. Not part of a checkpoint."""

    def __init__(self, parts: int, dim: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(parts, dim, classes))
        nn.init.normal_(self.weight, std=dim**-0.5 / 3**0.5)  # the deviation of nn.Linear's start
        self.bias = nn.Parameter(torch.zeros(parts, classes))

    def forward(self, features: Tensor) -> Tensor:
        """B×P×D → logits B×P×C."""
        return torch.einsum("bpd,pdc->bpc", features, self.weight) + self.bias

    @torch.no_grad()
    def take_means(self, means: Tensor, scale: float) -> None:
        """Become the nearest-mean classifiers of means C×P×D, logits −scale·‖f − μ‖².

        Up to what all classes share, that is the linear classifier of weight 2·scale·μ and bias
        −scale·‖μ‖².
        """
        self.weight.copy_(2 * scale * means.permute(1, 2, 0))
        self.bias.copy_(-scale * means.square().sum(2).T)


@torch.no_grad()
def imprint(
    classifiers: Mapping[str, PartClassifiers],
    model: CMT,
    images: np.ndarray,
    labels: Sequence[int],
    modalities: Sequence[Modality],
) -> dict[str, float]:
    """Start part classifiers as nearest-mean classifiers of what the network computes.

    Classifiers are no part of a checkpoint. Random ones send noise into weights that can already
    tell people apart, until every class has been seen a few times; class means are right from the
    first step (Qi, Brown, Lowe: "Low-Shot Learning with Imprinted Weights", CVPR 2018). Of several
    scales, the one with the lowest identity loss is used, on images that were left out of the
    means.

    classifiers: by the name of the output that they classify, see `CMTOutput`.
    images: uint8 N×3×H×W with their labels (0-based class) and modalities; the first few of each
        class and modality are used.
    Returns those identity losses by the same names, per part, in nats.
    """
    seen: Counter[tuple[int, Modality]] = Counter()
    rows, held = [], []
    for row, key in enumerate(zip(labels, modalities, strict=True)):
        if seen[key] < _EXEMPLARS:
            rows.append(row)
            held.append(seen[key] % 2 == 1)  # half of the images of each class and modality
        seen[key] += 1
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    outputs = [
        model(
            normalise(torch.from_numpy(images[part]).to(device)), [modalities[row] for row in part]
        ).float()
        for part in np.array_split(rows, max(1, len(rows) // _BATCH))
    ]
    model.train(was_training)
    owners = torch.tensor([labels[row] for row in rows], device=device)
    held_out = torch.tensor(held, device=device)
    return {
        name: _imprint(head, torch.cat([getattr(o, name) for o in outputs]), owners, held_out)
        for name, head in classifiers.items()
    }


def _imprint(head: PartClassifiers, features: Tensor, owners: Tensor, held_out: Tensor) -> float:
    """features R×P×D of owners R; held_out: R, left out of the means while scales are compared."""
    classes = head.bias.shape[1]
    some = _means(features[~held_out], owners[~held_out], classes)
    variance = float((features - features.mean(0)).square().sum(2).mean())
    scales = [scale / variance for scale in _SCALES]
    losses = []
    for scale in scales:
        head.take_means(some, scale)
        logits = head(features[held_out])
        losses.append(float(identity_loss(logits, owners[held_out])) / features.shape[1])
    best = int(np.argmin(losses))
    head.take_means(_means(features, owners, classes), scales[best])
    return losses[best]


def _means(features: Tensor, owners: Tensor, classes: int) -> Tensor:
    """R×P×D → C×P×D; a class without an image gets the mean of all."""
    sums = torch.zeros(classes, *features.shape[1:], device=features.device)
    sums.index_add_(0, owners, features)
    counts = torch.bincount(owners, minlength=classes)[:, None, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), features.mean(0))
