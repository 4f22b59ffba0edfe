"""What a CMT checkpoint is and computes: no HTTP, no SQL, no optimiser.

Names are imported on first use, so that `cmt --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.calibration import Calibration
    from model.checkpoint import (
        CheckpointError,
        CheckpointInfo,
        load_checkpoint,
        save_checkpoint,
        store_calibration,
    )
    from model.cmt import CMT, CMTOutput, modulation_of
    from model.config import CMTConfig, Modality
    from model.modulation import (
        Modulation,
        Strength,
        lift,
        modulate,
        modulated_cosine_distance,
        modulated_distance,
        part_distances,
        project,
    )
    from model.pixels import preprocess

__all__ = [
    "CMT",
    "CMTConfig",
    "CMTOutput",
    "Calibration",
    "CheckpointError",
    "CheckpointInfo",
    "Modality",
    "Modulation",
    "Strength",
    "lift",
    "load_checkpoint",
    "modulate",
    "modulated_cosine_distance",
    "modulated_distance",
    "modulation_of",
    "part_distances",
    "preprocess",
    "project",
    "save_checkpoint",
    "store_calibration",
]


# In this order a name is found before anything is loaded that it does not need, such as torch.
_MODULES = ("config", "pixels", "modulation", "cmt", "checkpoint", "calibration")


def __getattr__(name: str) -> object:
    """Find one of the names above in the module that defines it (PEP 562)."""
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"model.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module 'model' has no attribute {name!r}")
