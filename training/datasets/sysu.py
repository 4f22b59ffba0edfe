"""SYSU-MM01 layout: ``ROOT/cam{1..6}/{id:04d}/{frame:04d}.jpg`` and ``ROOT/exp/*_id.txt``.

Source: Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification" (ICCV 2017). Cameras
1, 2, 4 and 5 see visible light, 3 and 6 near infrared. Not every person was seen by every camera.
"""

from collections.abc import Iterable
from pathlib import Path

from training.datasets.matfile import read_mat
from training.datasets.sample import DatasetError, Modality, Sample

SYSU_RGB_CAMERAS = (1, 2, 4, 5)
SYSU_IR_CAMERAS = (3, 6)


def read_ids(path: Path) -> list[int]:
    """Read an identity list such as ``exp/train_id.txt``, ascending and without repeats.

    Args:
        path: comma-separated text, or the ``.mat`` form of the original archive (one numeric
            array, under the key ``id``).

    Raises:
        DatasetError: the file is missing, empty or not a list of positive whole numbers.
    """
    if not path.is_file():
        raise DatasetError(f"Expected the identity list {path}, but there is no such file.")
    values = _ids_from_mat(path) if path.suffix == ".mat" else _ids_from_text(path)
    if not values or min(values) < 1:
        raise DatasetError(f"Expected identities of 1 and above in {path}, separated by commas.")
    return sorted(set(values))


def read_sysu(root: Path, ids: Iterable[int] | None = None) -> list[Sample]:
    """List the images of some identities, sorted by identity, camera and frame.

    Args:
        root: folder that holds ``cam1`` to ``cam6``.
        ids: the identities to keep; None keeps every identity on disk.

    Raises:
        DatasetError: a camera folder is missing, an image is not named by its frame number, or an
            identity that was asked for has no image in any camera.
    """
    if not root.is_dir():
        raise DatasetError(f"Expected a SYSU-MM01 folder at {root}, but there is no such folder.")
    wanted = None if ids is None else set(ids)
    samples: list[Sample] = []
    for camera in sorted(SYSU_RGB_CAMERAS + SYSU_IR_CAMERAS):
        folder = root / f"cam{camera}"
        if not folder.is_dir():
            raise DatasetError(f"Expected the camera folder {folder} of the SYSU-MM01 layout.")
        modality: Modality = "ir" if camera in SYSU_IR_CAMERAS else "rgb"
        for person in folder.iterdir():
            # Names that are no identity (a desktop's thumbnails) belong to nobody.
            if not person.name.isdecimal() or not person.is_dir():
                continue
            if wanted is None or int(person.name) in wanted:
                samples.extend(
                    Sample(path, int(person.name), camera, modality) for path in _images(person)
                )
    missing = (wanted or set()) - {sample.person_id for sample in samples}
    if missing:
        first = min(missing)
        raise DatasetError(
            f"Expected images at {root}/cam*/{first:04d}/0001.jpg, but identity {first} "
            f"({len(missing)} missing in all) is in no camera of this folder."
        )
    if not samples:
        raise DatasetError(f"Expected images at {root}/cam1/0001/0001.jpg, but there are none.")
    return sorted(samples, key=lambda s: (s.person_id, s.camera, frame_number(s)))


def frame_number(sample: Sample) -> int:
    """The 1-based frame number in an image's name, by which official trials choose images."""
    return int(sample.path.stem)


def _images(person: Path) -> list[Path]:
    images = [path for path in person.iterdir() if path.suffix.lower() == ".jpg"]
    for path in images:
        if not path.stem.isdecimal():
            raise DatasetError(f"Expected {person}/0001.jpg and the like, but found {path.name}.")
    return images


def _ids_from_text(path: Path) -> list[int]:
    try:
        words = path.read_text(encoding="utf-8").replace(",", " ").split()
        return [int(word) for word in words]
    except ValueError as error:
        raise DatasetError(f"Expected whole numbers separated by commas in {path}.") from error


def _ids_from_mat(path: Path) -> list[int]:
    values = read_mat(path, "id").ravel()
    try:
        return [int(value) for value in values]
    except (TypeError, ValueError) as error:
        raise DatasetError(f"Expected whole numbers under the key 'id' in {path}.") from error
