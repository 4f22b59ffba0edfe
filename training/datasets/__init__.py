"""Readers of public re-identification layouts; each turns a folder into lists of `Sample`.

`LAYOUTS[name]` has the same methods for every layout: all images, the training side, the test side.
"""

from training.datasets.folder import Folder
from training.datasets.layout import Layout
from training.datasets.lists import read_ids
from training.datasets.llcm import LLCM
from training.datasets.regdb import RegDB
from training.datasets.sample import DatasetError, DatasetName, Modality, Sample
from training.datasets.sysu import SYSU_IR_CAMERAS, SYSU_RGB_CAMERAS, Sysu, read_sysu

LAYOUTS: dict[DatasetName, Layout] = {
    layout.name: layout for layout in (Sysu(), RegDB(), LLCM(), Folder())
}

__all__ = [
    "LAYOUTS",
    "SYSU_IR_CAMERAS",
    "SYSU_RGB_CAMERAS",
    "DatasetError",
    "DatasetName",
    "Layout",
    "Modality",
    "Sample",
    "read_ids",
    "read_sysu",
]
