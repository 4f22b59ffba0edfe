"""Fit what turns a checkpoint's distances into probabilities of "same person"."""

from training.calibration.calibrate import Fit, fit_calibration

__all__ = ["Fit", "fit_calibration"]
