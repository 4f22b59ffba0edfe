"""MATLAB files, as the original SYSU-MM01 archive carries its lists and trials in."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.datasets.sample import DatasetError, DatasetName


def read_mat(path: Path, key: str) -> npt.NDArray[Any]:
    """Read one array of a MATLAB file.

    Raises DatasetError where the file is missing, damaged, or has no array of that name.
    """
    from scipy.io import loadmat  # SciPy is needed only for this form
    from scipy.io.matlab import MatReadError

    try:
        return np.asarray(loadmat(path)[key])
    except KeyError as error:
        raise DatasetError(
            f"Expected an array under the key '{key}' in {path}.", DatasetName.SYSU
        ) from error
    except (MatReadError, OSError, TypeError, ValueError) as error:
        raise DatasetError(
            f"Expected a readable MATLAB file at {path}.", DatasetName.SYSU
        ) from error
