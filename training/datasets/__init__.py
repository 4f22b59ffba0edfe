"""Readers of public re-identification layouts; each turns a folder into lists of `Sample`.

`LAYOUTS[name]` has the same methods for every layout: all images, the training side, the test side.
"""

from pathlib import Path

from training.datasets.folder import Folder
from training.datasets.identity_lists import read_ids
from training.datasets.layout import Layout
from training.datasets.llcm import LLCM
from training.datasets.regdb import RegDB
from training.datasets.sample import DatasetError, DatasetName, Sample
from training.datasets.sysu import SYSU_IR_CAMERAS, SYSU_RGB_CAMERAS, Sysu, read_sysu

LAYOUTS: dict[DatasetName, Layout] = {
    layout.name: layout for layout in (Sysu(), RegDB(), LLCM(), Folder())
}


def find_layout(root: Path) -> Layout:
    """The layout that a folder has.

    Raises DatasetError where it has none of them; the message says what each holds.
    """
    if not root.is_dir():
        raise DatasetError(f"Expected a dataset at {root}, but there is no such folder.")
    for layout in LAYOUTS.values():
        if layout.fits(root):
            return layout
    raise DatasetError(
        f"Expected in {root} the folders of one layout: "
        + ", or ".join(f"{', '.join(one.folders)} ({one.name})" for one in LAYOUTS.values())
        + "; choose it with --dataset to hear what is missing, or see docs/training.md."
    )


__all__ = [
    "LAYOUTS",
    "SYSU_IR_CAMERAS",
    "SYSU_RGB_CAMERAS",
    "DatasetError",
    "DatasetName",
    "Layout",
    "Sample",
    "find_layout",
    "read_ids",
    "read_sysu",
]
