"""What a CMT checkpoint is and computes: no HTTP, no SQL, no optimiser.

Names that need torch are imported on first use, so that `cmt --help` answers at once. `preprocess`
is the exception: a late import would leave the module of that name in place of the function, so
that module itself imports without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from model.config import CMTConfig, Modality
from model.preprocess import preprocess

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


def __getattr__(name: str) -> object:
    """Find one of the names above in the module that defines it (PEP 562)."""
    if name in __all__:
        for module in ("model.calibration", "model.checkpoint", "model.cmt", "model.modulation"):
            found = getattr(import_module(module), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module 'model' has no attribute {name!r}")
