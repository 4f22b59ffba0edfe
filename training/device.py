"""The device that a command's --device names."""

from __future__ import annotations

import torch


def chosen_device(name: str) -> str:
    """The GPU for "auto" where there is one, else the CPU; any other name is itself."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
