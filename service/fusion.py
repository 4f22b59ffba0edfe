"""Several images of one person → one query."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def fuse(features: Tensor, *, normalise: bool) -> Tensor:
    """Complete representations of K images, K×P×D → their mean, P×D.

    normalise: scale the mean to unit norm over all P·D numbers, as a checkpoint that normalises
    ranks. γ and β are then generated once, from the mean. `cmt bench fusion` compares this with one
    image alone and with other ways.
    """
    x = features.mean(0)
    if not normalise:
        return x
    return functional.normalize(x.flatten(), dim=0).view_as(x)
