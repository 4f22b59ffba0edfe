"""SYSU-MM01's test protocol: which images are queries, and ten draws of the gallery.

Every infrared image is a query. The gallery of a trial holds, per identity and visible camera, one
image (single-shot) or ten (multi-shot); all-search takes cameras 1, 2, 4 and 5.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from training.datasets import SYSU_RGB_CAMERAS, DatasetError, Sample
from training.datasets.matfile import read_mat
from training.datasets.sysu import frame_number
from training.evaluation.metrics import IntArray

TRIALS = 10
TRIAL_FILE = Path("exp") / "rand_perm_cam.mat"


@dataclass(frozen=True)
class Trials:
    """The galleries of an evaluation.

    Attributes:
        convention: "official" where the archive's own trial file chose, else "seeded".
        galleries: per trial the indices of the gallery images within the samples.
    """

    convention: Literal["official", "seeded"]
    galleries: list[IntArray]


def query_indices(samples: Sequence[Sample]) -> IntArray:
    """Indices of the queries, all infrared images.

    Raises:
        DatasetError: there is none.
    """
    queries = [i for i, sample in enumerate(samples) if sample.modality == "ir"]
    if not queries:
        raise DatasetError("Expected infrared images (cameras 3 and 6) as queries; there are none.")
    return np.array(queries, dtype=np.int64)


def choose_trials(samples: Sequence[Sample], trial_file: Path | None) -> Trials:
    """All-search single-shot galleries: the official ones if `trial_file` is there, else seeded."""
    if trial_file is not None and trial_file.is_file():
        return Trials("official", official_galleries(samples, trial_file))
    return Trials("seeded", seeded_galleries(samples))


def official_galleries(
    samples: Sequence[Sample],
    trial_file: Path,
    cameras: Sequence[int] = SYSU_RGB_CAMERAS,
    shots: int = 1,
) -> list[IntArray]:
    """The archive's own trials: trial t takes the first `shots` frames of row t.

    `trial_file` holds a 6×1 cell `rand_perm_cam`; its cell c has per identity (index id − 1) a
    10×n_images array of 1-based frame numbers.

    Raises:
        DatasetError: the file has no entry for an identity, or names a frame that is not among
            the samples.
    """
    cells = read_mat(trial_file, "rand_perm_cam").ravel()
    index = {(s.person_id, s.camera, frame_number(s)): i for i, s in enumerate(samples)}
    galleries: list[list[int]] = [[] for _ in range(TRIALS)]
    for person, camera in _seen_by(samples, cameras):
        frames = _official_frames(cells, person, camera, trial_file)
        for gallery, row in zip(galleries, frames, strict=True):
            for frame in row[:shots]:
                if (person, camera, int(frame)) not in index:
                    raise DatasetError(
                        f"{trial_file} chooses cam{camera}/{person:04d}/{int(frame):04d}.jpg, "
                        "which is not in this folder; use the trial file that belongs to it."
                    )
                gallery.append(index[person, camera, int(frame)])
    return [np.array(gallery, dtype=np.int64) for gallery in galleries]


def seeded_galleries(
    samples: Sequence[Sample], cameras: Sequence[int] = SYSU_RGB_CAMERAS
) -> list[IntArray]:
    """The convention of most public code, single-shot: trial t seeds Python's `random` with t.

    Identities ascending, then cameras in order; `random.choice` over the files sorted by name. The
    draws of an identity depend on the identities before it: the same set gives the same galleries.
    """
    files: dict[tuple[int, int], list[int]] = {}
    for i in sorted(range(len(samples)), key=lambda i: samples[i].path.name):
        files.setdefault((samples[i].person_id, samples[i].camera), []).append(i)
    seen = _seen_by(samples, cameras)
    galleries = []
    for trial in range(TRIALS):
        generator = random.Random(trial)
        galleries.append(np.array([generator.choice(files[key]) for key in seen], dtype=np.int64))
    return galleries


def _seen_by(samples: Sequence[Sample], cameras: Sequence[int]) -> list[tuple[int, int]]:
    """(identity, camera) pairs that have images, in the order in which both conventions walk."""
    pairs = {(s.person_id, s.camera) for s in samples if s.camera in cameras}
    if not pairs:
        raise DatasetError(f"Expected gallery images in cameras {tuple(cameras)}; there are none.")
    return sorted(pairs, key=lambda pair: (pair[0], cameras.index(pair[1])))


def _official_frames(cells: np.ndarray, person: int, camera: int, trial_file: Path) -> np.ndarray:
    """Frame numbers of one identity in one camera, trials×n_images."""
    try:
        frames = np.asarray(cells[camera - 1].ravel()[person - 1])
    except (AttributeError, IndexError):
        frames = np.empty((0, 0))
    if frames.ndim != 2 or frames.shape[0] != TRIALS or frames.shape[1] == 0:
        raise DatasetError(
            f"Expected {TRIALS} trials for identity {person} in camera {camera} in {trial_file}; "
            "use the trial file that belongs to this folder, or remove it for seeded trials."
        )
    return frames
