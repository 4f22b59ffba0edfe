"""Ranking as the paper writes it: the gallery is modulated for the query, then distances."""

from __future__ import annotations

from torch import Tensor

from model import Modulation, modulate


def modulated_distances(x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
    """Equation (13), then the squared Euclidean distance.

    x: 1×P×D under γ, β 1×D, y: N×P×D → 1×N.
    """
    return (x[:, None] - modulate(y, modulation)).square().sum((2, 3))
