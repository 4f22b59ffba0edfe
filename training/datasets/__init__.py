"""Readers of public re-identification layouts; each turns a folder into a list of `Sample`."""

from training.datasets.sample import DatasetError, DatasetName, Modality, Sample
from training.datasets.sysu import SYSU_IR_CAMERAS, SYSU_RGB_CAMERAS, read_ids, read_sysu

__all__ = [
    "SYSU_IR_CAMERAS",
    "SYSU_RGB_CAMERAS",
    "DatasetError",
    "DatasetName",
    "Modality",
    "Sample",
    "read_ids",
    "read_sysu",
]
