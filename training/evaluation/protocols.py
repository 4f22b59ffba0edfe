"""The searches of each dataset's protocol, in the order of its tables."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model import Modality
from model.config import MODALITIES
from training.datasets import LAYOUTS, SYSU_IR_CAMERAS, DatasetError, DatasetName, Sample
from training.evaluation.metrics import IntArray, Protocol
from training.evaluation.splits import MIXED, TRIALS, Split, of_modality, seeded_gallery
from training.evaluation.sysu import sysu_splits


def protocol_of(dataset: DatasetName) -> Protocol:
    """Whose rules leave pairs out: a plain folder has RegDB's, which leave none out."""
    if dataset is DatasetName.SYSU:
        return "sysu"
    return "llcm" if dataset is DatasetName.LLCM else "regdb"


def protocol_splits(
    dataset: DatasetName,
    samples: Sequence[Sample],
    *,
    trial_file: Path | None = None,
    authors: bool = False,
) -> list[Split]:
    """All searches of a dataset's protocol, in the order of its tables.

    samples: every image of the test identities.
    trial_file: SYSU-MM01's official one; None, or a file that is not there, draws seeded
        galleries.
    authors: LLCM visible to infrared as the scripts of the set's authors have it, see
        `_authors_split`.
    Raises DatasetError where there are no queries or no gallery, or the trial file is of another
    set.
    """
    if dataset is DatasetName.SYSU:
        return sysu_splits(samples, trial_file)
    directions: tuple[tuple[str, Modality, Modality], ...] = (
        ("visible-to-infrared", "rgb", "ir"),
        ("infrared-to-visible", "ir", "rgb"),
    )
    splits = []
    for setting, query, gallery in directions:
        queries, pool = of_modality(samples, query), of_modality(samples, gallery)
        protocol = protocol_of(dataset)
        if dataset is DatasetName.LLCM and authors and query == "rgb":
            splits.append(_authors_split(samples, setting, queries, pool))
        elif dataset is DatasetName.LLCM:
            galleries = [seeded_gallery(samples, pool, trial) for trial in range(TRIALS)]
            splits.append(Split(protocol, setting, "", "seeded", queries, galleries))
        else:
            splits.append(Split(protocol, setting, "", "whole", queries, [pool]))
    return splits


def mixed_splits(dataset: DatasetName, samples: Sequence[Sample]) -> list[Split]:
    """Searches in galleries of both modalities, which is what services have.

    SYSU-MM01: queries of each infrared camera, against one crop of each person by each other camera
    but those at the same place (camera 2 for queries of camera 3). LLCM, whose cameras see both
    kinds of light: infrared and visible queries, against one crop of each person, camera and
    modality, but for their own person by their own camera. Ten seeded draws.

    Raises DatasetError for a set without cameras, where a query would find its neighbouring frames,
    and where there are no queries or no gallery.
    """
    cameras = np.array([sample.camera for sample in samples])
    if dataset is DatasetName.SYSU:
        asked = {
            f"{MIXED} gallery, camera {camera}": (
                np.flatnonzero(cameras == camera),
                np.flatnonzero((cameras != camera) & ((camera != 3) | (cameras != 2))),
            )
            for camera in SYSU_IR_CAMERAS
            if (cameras == camera).any()
        }
    elif dataset is DatasetName.LLCM:
        everything = np.arange(len(samples))
        asking: dict[str, Modality] = {"infrared": "ir", "visible": "rgb"}
        asked = {
            f"{MIXED} gallery, {word} queries": (of_modality(samples, modality), everything)
            for word, modality in asking.items()
        }
    else:
        raise DatasetError(
            f"Galleries of both modalities need cameras that differ from the query's, and "
            f"{LAYOUTS[dataset].title} does not say which camera took an image; evaluate without "
            "--protocol mixed",
            dataset,
        )
    splits = []
    for setting, (queries, pool) in asked.items():
        kinds = [np.intersect1d(pool, of_modality(samples, modality)) for modality in MODALITIES]
        galleries = [
            np.concatenate([seeded_gallery(samples, kind, trial) for kind in kinds])
            for trial in range(TRIALS)
        ]
        splits.append(Split(protocol_of(dataset), setting, "", "seeded", queries, galleries))
    return splits


def _authors_split(
    samples: Sequence[Sample], setting: str, visible: IntArray, infrared: IntArray
) -> Split:
    """LLCM visible to infrared as AGW/test.py and DEEN/test.py of ZYK100/LLCM compute it.

    They draw a gallery of infrared images, and then hand the transposed distances to the metrics:
    each drawn infrared image is a query, and all visible images are its gallery.
    """
    draws = [seeded_gallery(samples, infrared, trial) for trial in range(TRIALS)]
    queries = np.unique(np.concatenate(draws))
    return Split(
        protocol="llcm",
        setting=setting,
        shots="",
        convention="authors",
        queries=queries,
        galleries=[visible] * TRIALS,
        asked=[np.searchsorted(queries, draw) for draw in draws],
    )
