"""Fit what a checkpoint says of ranking: strength, similarities, scores and probabilities."""

from training.calibration.calibrate import Fit, fit_calibration

__all__ = ["Fit", "fit_calibration"]
