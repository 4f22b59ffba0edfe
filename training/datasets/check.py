"""`cmt data check`: what a dataset's folder holds, against what the set's papers count."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from model import Modality
from model.image_files import Skipped, find_images, is_other_programs
from training.datasets.decoding import READERS, UnreadableImageError, decode
from training.datasets.layout import Layout
from training.datasets.sample import DatasetError, Sample

Progress = Callable[[Iterator[str | None], int], Iterator[str | None]]


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

    counts: by the names of `Layout.published` ("training identities", …); without the side
        whose identity list is absent.
    cameras: in order of modality and number.
    one_modality: identities that have visible or infrared images only, each with the folder of
        one of them.
    empty: folders without any file, as an interrupted copy leaves them.
    unreadable: files that do not decode, each with the reason.
    skipped: files and folders that no layout uses, see `model.image_files`.
    notes: what could not be counted or is not as the protocol has it, in sentences.
    """

    counts: dict[str, int]
    cameras: list[CameraCount]
    one_modality: dict[int, Path]
    empty: list[Path]
    unreadable: list[tuple[Path, str]]
    skipped: list[Skipped]
    notes: list[str]


def check_dataset(
    layout: Layout, root: Path, trial: int = 1, *, progress: Progress | None = None
) -> DatasetCheck:
    """Count a folder and decode every image of it.

    progress: wraps the iterator over the files, whose number is its second argument.
    Raises DatasetError where the folder is not of this layout.
    """
    layout.check_trial(trial)
    layout.check_root(root)
    samples = layout.images(root, trial)
    counts = _side("", samples)
    notes = layout.notes(root)
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
                f"There is no image in {root} for {side}identities: {len(absent)}, the first is "
                f"{min(absent)}."
            )
    for other in set(range(1, layout.trials + 1)) - {trial}:
        try:
            layout.train_ids(root, other)
            layout.test_ids(root, other)
        except DatasetError as error:
            notes.append(f"Split {other}: {error}")
    folders: dict[int, dict[Modality, Path]] = defaultdict(dict)
    for sample in samples:
        folders[sample.person_id][sample.modality] = sample.path.parent
    return DatasetCheck(
        counts=counts,
        cameras=_cameras(samples),
        one_modality={
            person: next(iter(found.values()))
            for person, found in sorted(folders.items())
            if len(found) == 1
        },
        empty=_empty(root),
        unreadable=_unreadable(samples, progress),
        skipped=find_images(root).skipped,
        notes=notes,
    )


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


def _empty(root: Path) -> list[Path]:
    found = []
    for folder, below, files in os.walk(root):
        if not below and not files:
            found.append(Path(folder))
        below[:] = [name for name in below if not is_other_programs(name)]
    return sorted(found)


def _unreadable(samples: Sequence[Sample], progress: Progress | None) -> list[tuple[Path, str]]:
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(_problem, samples)
        if progress is not None:
            found = progress(found, len(samples))
        return [
            (sample.path, reason) for sample, reason in zip(samples, found, strict=True) if reason
        ]


def _problem(sample: Sample) -> str | None:
    try:
        decode(sample.path, sample.modality)
    except UnreadableImageError as error:
        return str(error)
    return None
