"""SYSU-MM01's test protocol: which images are queries, and ten draws of the gallery.

Every infrared image is a query. The gallery of a trial holds, per identity and visible camera, one
image (single-shot) or ten (multi-shot); all-search takes cameras 1, 2, 4 and 5, indoor-search
cameras 1 and 2.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.datasets import SYSU_RGB_CAMERAS, DatasetError, DatasetName, Sample
from training.datasets.matfile import read_mat
from training.datasets.sysu import frame_number
from training.evaluation.metrics import IntArray
from training.evaluation.splits import TRIALS, Convention, Split, of_modality, seeded_gallery

TRIAL_FILE = Path("exp") / "rand_perm_cam.mat"
SEARCHES = {"all": SYSU_RGB_CAMERAS, "indoor": (1, 2)}
SHOTS = {"single": 1, "multi": 10}


def sysu_splits(samples: Sequence[Sample], trial_file: Path | None) -> list[Split]:
    """All- and indoor-search, single- and multi-shot; indoor only where cameras 1, 2 have images.

    The galleries are the official ones if `trial_file` is there, else seeded.

    Raises DatasetError where there are no queries or no gallery, or the trial file is of another
    set.
    """
    official = trial_file is not None and trial_file.is_file()
    queries = of_modality(samples, "ir")
    splits = []
    for setting, cameras in SEARCHES.items():
        if setting == "indoor" and not any(sample.camera in cameras for sample in samples):
            continue
        for shots, number in SHOTS.items():
            galleries = (
                official_galleries(samples, trial_file, cameras, number)
                if official and trial_file is not None
                else seeded_galleries(samples, cameras, number)
            )
            convention: Convention = "official" if official else "seeded"
            splits.append(Split("sysu", setting, shots, convention, queries, galleries))
    return splits


def official_galleries(
    samples: Sequence[Sample],
    trial_file: Path,
    cameras: Sequence[int] = SYSU_RGB_CAMERAS,
    shots: int = 1,
) -> list[IntArray]:
    """The archive's own trials: trial t takes the first `shots` frames of row t.

    `trial_file` holds a 6×1 cell `rand_perm_cam`; its cell c has per identity (index id − 1) a
    10×n_images array of 1-based frame numbers.

    Raises DatasetError where the file has no entry for an identity, or names a frame that is not
    among the samples.
    """
    cells = read_mat(trial_file, "rand_perm_cam").ravel()
    index = {(s.person_id, s.camera, frame_number(s)): i for i, s in enumerate(samples)}
    galleries: list[list[int]] = [[] for _ in range(TRIALS)]
    for person, camera in sorted(
        {(samples[i].person_id, samples[i].camera) for i in _pool(samples, cameras)}
    ):
        frames = _official_frames(cells, person, camera, trial_file)
        for gallery, row in zip(galleries, frames, strict=True):
            for frame in row[:shots]:
                if (person, camera, int(frame)) not in index:
                    raise _error(
                        f"{trial_file} chooses cam{camera}/{person:04d}/{int(frame):04d}.jpg, "
                        "which is not in this folder; use the trial file that belongs to it."
                    )
                gallery.append(index[person, camera, int(frame)])
    return [np.array(gallery, dtype=np.int64) for gallery in galleries]


def seeded_galleries(
    samples: Sequence[Sample], cameras: Sequence[int] = SYSU_RGB_CAMERAS, shots: int = 1
) -> list[IntArray]:
    """Ten draws of `seeded_gallery` from the images of some visible cameras."""
    pool = _pool(samples, cameras)
    return [seeded_gallery(samples, pool, trial, shots) for trial in range(TRIALS)]


def _pool(samples: Sequence[Sample], cameras: Sequence[int]) -> IntArray:
    """Indices of the images of some cameras."""
    pool = [i for i, sample in enumerate(samples) if sample.camera in cameras]
    if not pool:
        raise _error(f"Expected gallery images in cameras {tuple(cameras)}; there are none.")
    return np.array(pool, dtype=np.int64)


def _official_frames(cells: np.ndarray, person: int, camera: int, trial_file: Path) -> np.ndarray:
    """Frame numbers of one identity in one camera, trials×n_images."""
    try:
        frames = np.asarray(cells[camera - 1].ravel()[person - 1])
    except (AttributeError, IndexError):
        frames = np.empty((0, 0))
    if frames.ndim != 2 or frames.shape[0] != TRIALS or frames.shape[1] == 0:
        raise _error(
            f"Expected {TRIALS} trials for identity {person} in camera {camera} in {trial_file}; "
            "use the trial file that belongs to this folder, or --convention seeded."
        )
    return frames


def _error(message: str) -> DatasetError:
    return DatasetError(message, DatasetName.SYSU)
