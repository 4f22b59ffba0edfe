"""Protocols and metrics: what a checkpoint is worth, and whether its two modules are alive."""

from training.evaluation.metrics import RankMetrics, rank_metrics
from training.evaluation.protocols import protocol_splits
from training.evaluation.report import Evaluation, evaluate_model
from training.evaluation.splits import Split

__all__ = [
    "Evaluation",
    "RankMetrics",
    "Split",
    "evaluate_model",
    "protocol_splits",
    "rank_metrics",
]
