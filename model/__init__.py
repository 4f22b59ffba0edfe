"""What a CMT checkpoint is and computes: no HTTP, no SQL, no optimiser."""

from model.checkpoint import CheckpointError, CheckpointInfo, load_checkpoint, save_checkpoint
from model.cmt import CMT, CMTOutput
from model.config import CMTConfig, Modality
from model.modulation import (
    Modulation,
    lift,
    modulate,
    modulated_cosine_distance,
    modulated_distance,
    part_distances,
    project,
)
from model.preprocess import preprocess

__all__ = [
    "CMT",
    "CMTConfig",
    "CMTOutput",
    "CheckpointError",
    "CheckpointInfo",
    "Modality",
    "Modulation",
    "lift",
    "load_checkpoint",
    "modulate",
    "modulated_cosine_distance",
    "modulated_distance",
    "part_distances",
    "preprocess",
    "project",
    "save_checkpoint",
]
