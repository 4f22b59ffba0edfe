"""From a feature map to part features F (CMT §3.1): stripes, pooling, per-part reduction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PartFeatures(nn.Module):
    """B×C×H×W → F: B×P×D, never negative.

    P horizontal stripes, generalised-mean pooling in each (exponent `gem_p`; Radenović et al.),
    then each stripe's own 1×1 reduction C → D with batch norm and ReLU, as in HCT.
    """

    def __init__(self, channels: int, parts: int, dim: int, gem_p: float) -> None:
        super().__init__()
        self.parts = parts
        self.dim = dim
        self.gem_p = gem_p
        # One weight per part, applied as one batched product instead of P small convolutions.
        self.weight = nn.Parameter(torch.empty(parts, channels, dim))
        nn.init.normal_(self.weight, std=(2.0 / dim) ** 0.5)  # kaiming, fan_out
        self.norm = nn.BatchNorm1d(parts * dim)

    def forward(self, feature_map: Tensor) -> Tensor:
        stripes = self.pool(feature_map.to(self.weight.dtype))  # B×P×C, out of autocast's bf16
        reduced = torch.einsum("bpc,pcd->bpd", stripes, self.weight)
        normed: Tensor = self.norm(reduced.flatten(1))
        return functional.relu(normed).view_as(reduced)

    def pool(self, feature_map: Tensor) -> Tensor:
        """Generalised mean over each stripe: B×C×H×W → B×P×C, (mean of a^p)^(1/p)."""
        batch, channels, _, width = feature_map.shape
        # a^p of a small activation underflows at a high exponent, and its root has no gradient.
        smallest = max(1e-6, 1e-36 ** (1 / self.gem_p))
        powered = feature_map.clamp(min=smallest).pow(self.gem_p)
        stripes = powered.reshape(batch, channels, self.parts, -1, width).mean(dim=(3, 4))  # B×C×P
        return torch.pow(stripes, 1.0 / self.gem_p).transpose(1, 2)
