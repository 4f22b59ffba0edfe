"""SYSU-MM01 layout: ``ROOT/cam{1..6}/{id:04d}/{frame:04d}.jpg`` and ``ROOT/exp/*_id.txt``.

Source: Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification" (ICCV 2017). Cameras
1, 2, 4 and 5 see visible light, 3 and 6 near infrared. Not every person was seen by every camera.
"""

from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

from model import Modality
from model.image_files import find_images
from training.datasets.identity_lists import read_ids
from training.datasets.layout import Layout
from training.datasets.sample import DatasetError, DatasetName, Sample

SYSU_RGB_CAMERAS = (1, 2, 4, 5)
SYSU_IR_CAMERAS = (3, 6)


class Sysu(Layout):
    """Trained on exp/train_id and exp/val_id, tested on exp/test_id (.txt or .mat).

    Where there is no list of test people, those of exp/val_id are held back: they are all that is
    left to test on.
    """

    name = DatasetName.SYSU
    title = "SYSU-MM01"
    folders = tuple(f"cam{camera}" for camera in sorted(SYSU_RGB_CAMERAS + SYSU_IR_CAMERAS))
    published: ClassVar[dict[str, int]] = {
        "training identities": 395,
        "training visible images": 22258,
        "training infrared images": 11909,
        "test identities": 96,
        "test infrared images": 3803,  # the queries
    }

    def images(
        self, root: Path, trial: int = 1, ids: Collection[int] | None = None
    ) -> list[Sample]:
        return read_sysu(root, ids)

    def train_ids(self, root: Path, trial: int = 1) -> set[int]:
        ids = set(read_ids(_id_list(root, "train"), self.name))
        if self._holds_back(root) or not _id_list(root, "val").is_file():
            return ids
        # Minus the test people, as a copy of val_id.txt may have been made the test list.
        validation = set(read_ids(_id_list(root, "val"), self.name))
        return ids | (validation - self.test_ids(root))

    def test_ids(self, root: Path, trial: int = 1) -> set[int]:
        return set(read_ids(_id_list(root, "test"), self.name))

    def notes(self, root: Path) -> list[str]:
        if not self._holds_back(root):
            return []
        path = _id_list(root, "val")
        number = len(read_ids(path, self.name))
        return [
            f"The {number} identities of {path} are held back from training, because there is no "
            f"list of test identities: evaluate on them with --ids {path}."
        ]

    def _holds_back(self, root: Path) -> bool:
        return _id_list(root, "val").is_file() and not _id_list(root, "test").is_file()


def read_sysu(root: Path, ids: Collection[int] | None = None) -> list[Sample]:
    """List the images of some identities, sorted by identity, camera and frame.

    root: folder that holds ``cam1`` to ``cam6``.
    ids: the identities to keep; None keeps every identity on disk.
    Raises DatasetError where a camera folder is missing, an image is not named by its frame number,
    or an identity that was asked for has no image in any camera.
    """
    Sysu().check_root(root)
    wanted = None if ids is None else set(ids)
    samples: list[Sample] = []
    for camera in sorted(SYSU_RGB_CAMERAS + SYSU_IR_CAMERAS):
        folder = root / f"cam{camera}"
        modality: Modality = "ir" if camera in SYSU_IR_CAMERAS else "rgb"
        for person in folder.iterdir():
            # Names that are no identity (a desktop's thumbnails) belong to nobody.
            if not person.name.isdecimal() or not person.is_dir():
                continue
            if wanted is None or int(person.name) in wanted:
                samples.extend(
                    Sample(path, int(person.name), camera, modality) for path in _images(person)
                )
    Sysu().refuse_namesakes((sample.path.parent.name, sample.person_id) for sample in samples)
    samples = Sysu().require(samples, ids, lambda person: f"{root}/cam*/{person:04d}/0001.jpg")
    if not samples:
        raise _error(f"Expected images at {root}/cam1/0001/0001.jpg, but there are none.")
    return sorted(samples, key=lambda s: (s.person_id, s.camera, frame_number(s)))


def frame_number(sample: Sample) -> int:
    """The 1-based frame number in an image's name, by which official trials choose images."""
    return int(sample.path.stem)


def _images(person: Path) -> list[Path]:
    images = find_images(person, below=False).images
    for path in images:
        if not path.stem.isdecimal():
            raise _error(f"Expected {person}/0001.jpg and the like, but found {path.name}.")
    return images


def _id_list(root: Path, side: str) -> Path:
    """The text, or where only that is there the original archive's .mat."""
    text = root / "exp" / f"{side}_id.txt"
    matlab = text.with_suffix(".mat")
    return matlab if matlab.is_file() and not text.is_file() else text


def _error(message: str) -> DatasetError:
    return DatasetError(message, DatasetName.SYSU)
