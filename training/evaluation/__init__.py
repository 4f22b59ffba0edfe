"""Protocols and metrics: what a checkpoint is worth, and whether its two modules are alive."""

from training.evaluation.metrics import RankMetrics, rank_metrics
from training.evaluation.report import Evaluation, evaluate_sysu

__all__ = ["Evaluation", "RankMetrics", "evaluate_sysu", "rank_metrics"]
