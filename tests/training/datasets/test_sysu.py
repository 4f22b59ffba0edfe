"""The SYSU-MM01 reader on a small committed folder, and what it says of a damaged one."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from tests.paths import MINI
from training.datasets import DatasetError, Sample, read_ids, read_sysu

TRAIN = [7, 18, 21, 23, 30]
VALIDATION = [12, 218, 370]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(MINI, tmp_path / "set"))


def test_lists_every_image_sorted() -> None:
    samples = read_sysu(MINI)
    assert len(samples) == 94
    keys = [(s.person_id, s.camera, s.path.name) for s in samples]
    assert keys == sorted(keys)
    assert samples[0] == Sample(MINI / "cam1" / "0007" / "0001.jpg", 7, 1, "rgb")
    assert {s.person_id for s in samples} == {*TRAIN, *VALIDATION}


def test_cameras_3_and_6_are_infrared() -> None:
    modalities = {(s.camera, s.modality) for s in read_sysu(MINI)}
    assert modalities == {
        (1, "rgb"),
        (2, "rgb"),
        (3, "ir"),
        (4, "rgb"),
        (5, "rgb"),
        (6, "ir"),
    }


def test_keeps_only_the_identities_asked_for() -> None:
    # Person 12 was never seen by camera 4: two images fewer.
    counts = Counter(s.person_id for s in read_sysu(MINI, VALIDATION))
    assert counts == {12: 10, 218: 12, 370: 12}


def test_frames_sort_by_number_not_by_name(copy: Path) -> None:
    source = copy / "cam1" / "0007" / "0002.jpg"
    source.rename(source.with_name("10000.jpg"))
    names = [s.path.name for s in read_sysu(copy, [7]) if s.camera == 1]
    assert names == ["0001.jpg", "10000.jpg"]


def test_files_that_are_no_images_are_left_alone(copy: Path) -> None:
    (copy / "cam1" / "Thumbs.db").write_bytes(b"")
    (copy / "cam1" / "0007" / "notes.txt").write_text("")
    assert len(read_sysu(copy)) == 94


def without_people(root: Path) -> None:
    for folder in root.glob("cam*/*"):
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), "no such folder"),
        (lambda root: shutil.rmtree(root / "cam6"), "cam6"),
        (
            lambda root: (root / "cam2/0007/0001.jpg").rename(root / "cam2/0007/front.jpg"),
            r"0007/0001\.jpg and the like, but found front\.jpg",
        ),
        (without_people, r"cam1/0001/0001\.jpg"),
    ],
)
def test_a_folder_of_another_layout_is_refused(
    copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy)
    with pytest.raises(DatasetError, match=message):
        read_sysu(copy)


def test_an_identity_without_images_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"cam\*/0099/0001\.jpg"):
        read_sysu(MINI, [7, 99])


def test_ids_from_text(tmp_path: Path) -> None:
    assert read_ids(MINI / "exp" / "train_id.txt") == TRAIN
    path = tmp_path / "ids.txt"
    path.write_text("30, 7,\n7\n")
    assert read_ids(path) == [7, 30]


def test_ids_from_matlab(tmp_path: Path) -> None:
    path = tmp_path / "test_id.mat"
    savemat(path, {"id": np.array([[6, 10, 17]], dtype=np.uint16)})
    assert read_ids(path) == [6, 10, 17]


@pytest.mark.parametrize("content", ["", "a,b", "0,1", "1.5"])
def test_a_text_that_is_no_identity_list_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ids.txt"
    path.write_text(content)
    with pytest.raises(DatasetError, match=str(path)):
        read_ids(path)


def test_missing_or_damaged_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        read_ids(tmp_path / "val_id.txt")
    other_key = tmp_path / "other.mat"
    savemat(other_key, {"ids": np.array([1])})
    with pytest.raises(DatasetError, match="'id'"):
        read_ids(other_key)
    damaged = tmp_path / "damaged.mat"
    damaged.write_bytes(other_key.read_bytes()[:150])
    with pytest.raises(DatasetError, match="readable MATLAB file"):
        read_ids(damaged)
