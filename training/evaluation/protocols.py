"""The searches of each dataset's protocol, in the order of its tables."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model import Modality
from training.datasets import DatasetName, Sample
from training.evaluation.metrics import IntArray, Protocol
from training.evaluation.splits import TRIALS, Split, of_modality, seeded_gallery
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
