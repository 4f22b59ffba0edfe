"""`cmt data check`: what a dataset's folder holds, against what the set's papers count."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.datasets.layout import Layout
from training.datasets.sample import IMAGE_FORMATS, DatasetError, Modality, Sample

READERS = 4  # Pillow decodes outside Python's lock


@dataclass(frozen=True)
class CameraCount:
    """Images and identities of one camera and modality."""

    modality: Modality
    camera: int
    identities: int
    images: int


@dataclass(frozen=True)
class DatasetCheck:
    """What a folder holds.

    Attributes:
        counts: by the names of `Layout.published` ("training identities", …); without the side
            whose identity list is absent.
        cameras: in order of modality and number.
        one_modality: identities that have visible or infrared images only.
        unreadable: files that do not decode, each with the reason.
        notes: sides that could not be counted, and why.
    """

    counts: dict[str, int]
    cameras: list[CameraCount]
    one_modality: list[int]
    unreadable: list[tuple[Path, str]]
    notes: list[str]


def check_dataset(
    layout: Layout, root: Path, trial: int = 1, *, decode: bool = True
) -> DatasetCheck:
    """Count a folder and, unless told otherwise, decode every image of it.

    Raises:
        DatasetError: the folder is not of this layout.
    """
    layout.check_trial(trial)
    samples = layout.images(root, trial)
    counts = _side("", samples)
    notes = []
    for side, identities in (("training ", layout.train_ids), ("test ", layout.test_ids)):
        try:
            ids = identities(root, trial)
        except DatasetError as error:  # a folder without its test side can still be trained on
            notes.append(str(error))
            continue
        counts |= _side(side, [sample for sample in samples if sample.person_id in ids])
        absent = ids - {sample.person_id for sample in samples}
        if absent:
            notes.append(
                f"{len(absent)} {side}identities have no image in {root}, the first is "
                f"{min(absent)}."
            )
    modalities = defaultdict(set)
    for sample in samples:
        modalities[sample.person_id].add(sample.modality)
    return DatasetCheck(
        counts=counts,
        cameras=_cameras(samples),
        one_modality=sorted(person for person, found in modalities.items() if len(found) == 1),
        unreadable=_unreadable(samples) if decode else [],
        notes=notes,
    )


def decode_error(path: Path) -> str | None:
    """Why a file is no image that can be decoded to its last row; None if it is one."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's sentence repeats the path for a file of no known format.
        return str(error).replace(repr(str(path)), "file")
    return None


def _side(side: str, samples: Sequence[Sample]) -> dict[str, int]:
    visible = sum(sample.modality == "rgb" for sample in samples)
    return {
        f"{side}identities": len({sample.person_id for sample in samples}),
        f"{side}images": len(samples),
        f"{side}visible images": visible,
        f"{side}infrared images": len(samples) - visible,
    }


def _cameras(samples: Sequence[Sample]) -> list[CameraCount]:
    images = Counter((sample.modality, sample.camera) for sample in samples)
    people = Counter(
        key[:2]
        for key in {(sample.modality, sample.camera, sample.person_id) for sample in samples}
    )
    order = sorted(images, key=lambda key: (key[0] == "ir", key[1]))
    return [CameraCount(*key, identities=people[key], images=images[key]) for key in order]


def _unreadable(samples: Sequence[Sample]) -> list[tuple[Path, str]]:
    paths = [sample.path for sample in samples]
    with ThreadPoolExecutor(READERS) as pool:
        errors = pool.map(decode_error, paths)
        return [(path, error) for path, error in zip(paths, errors, strict=True) if error]
