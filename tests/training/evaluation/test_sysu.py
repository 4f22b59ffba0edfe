"""Queries and galleries of SYSU-MM01's protocol, by both conventions."""

import os
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.io import loadmat, savemat

from tests.paths import MINI
from training.datasets import DatasetError, Sample, read_sysu
from training.evaluation.metrics import IntArray
from training.evaluation.splits import of_modality
from training.evaluation.sysu import official_galleries, seeded_galleries, sysu_splits

VALIDATION = [12, 218, 370]
OFFICIAL = os.environ.get("SYSU_TRIAL_FILE", "")

# Ten rows of frame numbers for every camera and person.
Frames = dict[tuple[int, int], npt.NDArray[np.uint16]]


def write_trials(path: Path, frames: Frames, people: int = 400) -> Path:
    """A file of the archive's form: a 6×1 cell of people×1 cells of 10×n_images arrays."""
    cells = np.empty((6, 1), dtype=object)
    for camera in range(1, 7):
        cells[camera - 1, 0] = np.empty((people, 1), dtype=object)
        for person in range(1, people + 1):
            empty = np.zeros((10, 0), dtype=np.uint16)
            cells[camera - 1, 0][person - 1, 0] = frames.get((camera, person), empty)
    savemat(path, {"rand_perm_cam": cells})
    return path


@pytest.fixture
def samples() -> list[Sample]:
    return read_sysu(MINI, VALIDATION)


@pytest.fixture
def frames(samples: list[Sample]) -> Frames:
    """Ten permutations of every (camera, person)'s frames."""
    generator = np.random.default_rng(5)
    counts: dict[tuple[int, int], int] = {}
    for sample in samples:
        key = sample.camera, sample.person_id
        counts[key] = counts.get(key, 0) + 1
    return {
        key: np.stack([generator.permutation(n) + 1 for _ in range(10)]).astype(np.uint16)
        for key, n in counts.items()
    }


def chosen(samples: list[Sample], gallery: IntArray) -> list[tuple[int, int, str]]:
    return [(samples[i].person_id, samples[i].camera, samples[i].path.name) for i in gallery]


def test_every_infrared_image_is_a_query(samples: list[Sample]) -> None:
    queries = of_modality(samples, "ir")
    assert [samples[i].camera for i in queries] == [3, 3, 6, 6] * 3
    with pytest.raises(DatasetError, match="infrared"):
        of_modality([sample for sample in samples if sample.modality == "rgb"], "ir")


def test_seeded_trials_follow_the_convention_of_public_code(samples: list[Sample]) -> None:
    galleries = seeded_galleries(samples)
    assert len(galleries) == 10
    for trial, gallery in enumerate(galleries):
        random.seed(trial)  # as public code does, walking the folders
        expected = []
        for person in sorted(VALIDATION):
            for camera in (1, 2, 4, 5):
                folder = MINI / f"cam{camera}" / f"{person:04d}"
                if folder.is_dir():
                    file = random.choice(sorted(folder.iterdir()))
                    expected.append((person, camera, file.name))
        assert chosen(samples, gallery) == expected
    assert any(not np.array_equal(galleries[0], other) for other in galleries[1:])


def test_official_trials_take_the_first_frame_of_each_row(
    samples: list[Sample], frames: Frames, tmp_path: Path
) -> None:
    path = write_trials(tmp_path / "rand_perm_cam.mat", frames)
    split = sysu_splits(samples, path)[0]
    assert (split.setting, split.shots, split.convention) == ("all", "single", "official")
    for trial, gallery in enumerate(split.galleries):
        expected = [
            (person, camera, f"{frames[camera, person][trial, 0]:04d}.jpg")
            for person in VALIDATION
            for camera in (1, 2, 4, 5)
            if (camera, person) in frames
        ]
        assert chosen(samples, gallery) == expected


def test_official_trials_by_camera_and_number_of_shots(
    samples: list[Sample], frames: Frames, tmp_path: Path
) -> None:
    path = write_trials(tmp_path / "rand_perm_cam.mat", frames)
    galleries = official_galleries(samples, path, cameras=(1, 2), shots=10)
    # Two images each of three persons in two cameras: ten shots take them all.
    assert all(len(set(gallery)) == 12 for gallery in galleries)
    assert {samples[i].camera for i in galleries[0]} == {1, 2}


def test_without_a_trial_file_trials_are_seeded(samples: list[Sample], tmp_path: Path) -> None:
    for missing in (None, tmp_path / "rand_perm_cam.mat"):
        split = sysu_splits(samples, missing)[0]
        assert split.convention == "seeded"
        for gallery, expected in zip(split.galleries, seeded_galleries(samples), strict=True):
            np.testing.assert_array_equal(gallery, expected)


def test_all_four_searches_of_the_protocol(samples: list[Sample]) -> None:
    splits = sysu_splits(samples, None)
    assert [split.title for split in splits] == [
        "all-search single-shot",
        "all-search multi-shot",
        "indoor-search single-shot",
        "indoor-search multi-shot",
    ]
    for split in splits:
        cameras = {1, 2} if split.setting == "indoor" else {1, 2, 4, 5}
        assert split.protocol == "sysu"
        assert split.queries.size == 12  # infrared images of the outdoor camera 6 too
        for gallery in split.galleries:
            assert {samples[i].camera for i in gallery} == cameras
            # Person 12 was never seen by camera 4; everyone has two images in a camera.
            cells = 3 * len(cameras) - (split.setting == "all")
            assert len(set(gallery)) == cells * (2 if split.shots == "multi" else 1)


def test_indoor_search_is_left_out_without_indoor_cameras(samples: list[Sample]) -> None:
    outdoor = [sample for sample in samples if sample.camera not in (1, 2)]
    assert {split.setting for split in sysu_splits(outdoor, None)} == {"all"}


def test_seeded_multi_shot_draws_ten_different_files() -> None:
    many = [Sample(Path(f"{frame:04d}.jpg"), 1, 1, "rgb") for frame in range(30)]
    galleries = seeded_galleries(many, shots=10)
    assert all(len(set(gallery)) == 10 for gallery in galleries)
    assert len({tuple(sorted(gallery)) for gallery in galleries}) > 5


def test_a_trial_file_of_another_set_is_refused(
    samples: list[Sample], frames: Frames, tmp_path: Path
) -> None:
    foreign: Frames = {**frames, (1, 12): np.full((10, 1), 77, dtype=np.uint16)}
    with pytest.raises(DatasetError, match=r"cam1/0012/0077\.jpg"):
        official_galleries(samples, write_trials(tmp_path / "frames.mat", foreign))
    with pytest.raises(DatasetError, match="identity 370 in camera 1"):
        official_galleries(samples, write_trials(tmp_path / "few.mat", frames, people=300))
    del frames[5, 218]
    with pytest.raises(DatasetError, match="identity 218 in camera 5"):
        official_galleries(samples, write_trials(tmp_path / "none.mat", frames))


# The 96 test identities of the real set (its exp/test_id.txt).
TEST_IDENTITIES = [
    *(6, 10, 17, 21, 24, 25, 27, 28, 31, 34, 36, 37, 40, 41, 42, 43, 44, 45, 49, 50, 51, 54, 63),
    *(69, 75, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 93, 102, 104, 105, 106, 108, 112, 116),
    *(117, 122, 125, 129, 130, 134, 138, 139, 150, 152, 162, 166, 167, 170, 172, 176, 185, 190),
    *(192, 202, 204, 207, 210, 215, 223, 229, 232, 237, 252, 253, 257, 259, 263, 266, 269, 272),
    *(273, 274, 275, 282, 285, 291, 300, 301, 302, 303, 307, 312, 315, 318, 331, 333),
]


@pytest.mark.skipif(not OFFICIAL, reason="SYSU_TRIAL_FILE names no official trial file")
def test_the_official_file_gives_the_published_sizes() -> None:
    """Samples as the file itself counts them; the images need not be there."""
    cells = loadmat(OFFICIAL)["rand_perm_cam"].ravel()
    rows = {(c, p): cells[c - 1].ravel()[p - 1] for c in range(1, 7) for p in TEST_IDENTITIES}
    samples = [
        Sample(Path(f"cam{c}/{p:04d}/{frame:04d}.jpg"), p, c, "ir" if c in (3, 6) else "rgb")
        for (c, p), frames in rows.items()
        for frame in range(1, frames.shape[1] + 1)
    ]
    path = Path(OFFICIAL)
    assert of_modality(samples, "ir").size == 3803
    for cameras, shots, size in (
        ((1, 2, 4, 5), 1, 301),
        ((1, 2, 4, 5), 10, 3010),
        ((1, 2), 1, 112),
        ((1, 2), 10, 1120),
    ):
        galleries = official_galleries(samples, path, cameras, shots)
        assert [len(set(gallery)) for gallery in galleries] == [size] * 10
    for trial, gallery in enumerate(sysu_splits(samples, path)[0].galleries):
        for i in gallery:
            sample = samples[i]
            assert int(sample.path.stem) == rows[sample.camera, sample.person_id][trial, 0]
