"""Protocols and metrics: what a checkpoint is worth, and whether its two modules are alive."""

from training.evaluation.metrics import RankMetrics, rank_metrics

__all__ = ["RankMetrics", "rank_metrics"]
