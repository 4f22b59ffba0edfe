"""The searches of each dataset's protocol, in the order of its tables."""

from collections.abc import Sequence
from pathlib import Path

from model import Modality
from training.datasets import DatasetName, Sample
from training.evaluation.metrics import Protocol
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
) -> list[Split]:
    """All searches of a dataset's protocol, in the order of its tables.

    samples: every image of the test identities.
    trial_file: SYSU-MM01's official one; None, or a file that is not there, draws seeded
        galleries.
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
        if dataset is DatasetName.LLCM:
            galleries = [seeded_gallery(samples, pool, trial) for trial in range(TRIALS)]
            splits.append(Split(protocol, setting, "", "seeded", queries, galleries))
        else:
            splits.append(Split(protocol, setting, "", "whole", queries, [pool]))
    return splits
