"""The exponential moving average of a network's weights, which is saved in their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AveragedWeights:
    """averaged ← decay·averaged + (1 − decay)·current, batch norm's statistics included.

    decay: of late steps. Step t, from 0, takes at most (1 + t) / (10 + t), so that the average
        forgets its start quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = copy_of(model)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in the weights that `model` has after `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        floating = [n for n, tensor in self.weights.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[name] for name in floating],
            [current[name].detach() for name in floating],
            1 - decay,
        )
        for name in self.weights.keys() - set(floating):
            self.weights[name].copy_(current[name])


def copy_of(model: nn.Module, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """The weights as they are now, on `device` (default: where they are)."""
    return {n: tensor.detach().to(device, copy=True) for n, tensor in model.state_dict().items()}
