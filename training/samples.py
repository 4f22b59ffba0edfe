"""The samples of a training run: to learn from, and to be validated on meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.datasets import LAYOUTS, DatasetError, DatasetName, Sample
from training.learnt import learnt_people, name_of
from training.validation import Selection, Validation, drawn_identities


@dataclass(frozen=True)
class TrainingData:
    """The images that a run learns from, and those that it is measured on meanwhile.

    samples: images to train on.
    validation: on people who are not among `samples`; None where nobody is held out.
    selection: whether the last weights become the checkpoint, or the best on `validation`.
    facts: what the checkpoint records of its data, see `facts_of`.
    """

    samples: Sequence[Sample]
    validation: Validation | None = None
    selection: Selection = "last"
    facts: Mapping[str, Any] = field(default_factory=dict)


def facts_of(
    dataset: DatasetName,
    trial: int,
    samples: Sequence[Sample],
    name: str | None = None,
    selected_on: Sequence[Sample] = (),
) -> dict[str, Any]:
    """What a checkpoint says of the images that it was trained on.

    By the people it learnt from, `cmt evaluate` and `cmt calibrate` refuse whom the network knows.
    name: of the data set, as stated. selected_on: the images that its weights are chosen on.
    """
    own = learnt_people(dataset, name_of(dataset, name), samples)
    facts: dict[str, Any] = {
        "dataset": dataset.value,
        "identities": own.identities,
        "images": len(samples),
        "learnt_from": [own.model_dump()],
    }
    if selected_on:
        selecting = learnt_people(dataset, name_of(dataset, name), selected_on)
        facts["selected_on"] = [selecting.model_dump()]
    return facts | ({"trial": trial} if LAYOUTS[dataset].trials > 1 else {})


def training_samples(
    roots: Sequence[Path],
    train_ids: Sequence[Path] | None,
    dataset: DatasetName = DatasetName.SYSU,
    trial: int = 1,
) -> list[Sample]:
    """The images of the chosen identities of all roots, root by root.

    Raises DatasetError when an identity is in two roots (they would be two people) or in none.
    """
    layout = LAYOUTS[dataset]
    wanted: dict[int, str] | None = None
    for path in train_ids or ():
        wanted = (wanted or {}) | layout.read_ids(path)
    samples: list[Sample] = []
    for root in roots:
        found = layout.train(root, trial, wanted)
        known = {sample.person_id for sample in samples}
        twice = known & {sample.person_id for sample in found}
        if twice:
            raise DatasetError(
                f"identity {min(twice)} is in {root} and in an earlier root; give every person "
                "one number"
            )
        samples += found
    people = {sample.person_id for sample in samples}
    missing = [name for number, name in (wanted or {}).items() if number not in people]
    if missing:
        raise DatasetError(
            f"identity {missing[0]} ({len(missing)} missing in all) is in none of the roots; "
            "correct --train-ids or add its root"
        )
    if not Counter(sample.modality for sample in samples).keys() >= {"rgb", "ir"}:
        raise DatasetError(
            "no visible or no infrared images for the chosen identities in "
            f"{', '.join(map(str, roots))}",
            dataset,
        )
    return samples


def held_out_samples(
    samples: Sequence[Sample],
    roots: Sequence[Path],
    dataset: DatasetName,
    trial: int,
    *,
    share: float = 0.0,
    ids: Path | None = None,
) -> list[Sample]:
    """The images of the people to validate on: listed in the file `ids`, or a share of `samples`.

    Listed people may be others than those of `samples`, but none whom the roots' protocol tests on.
    Raises DatasetError for such a one, for one in none of the roots, and where too few are left.
    """
    if ids is None:
        people = drawn_identities(samples, share) if share else set()
        return [sample for sample in samples if sample.person_id in people]
    layout = LAYOUTS[dataset]
    if dataset is not DatasetName.FOLDER:  # which has no test side of its own
        tested = set(layout.read_ids(ids)) & _test_ids(roots, dataset, trial)
        if tested:
            raise DatasetError(
                f"{ids} names identity {min(tested)}, whom the protocol tests on; validate on "
                "people of the training side only"
            )
    return training_samples(roots, [ids], dataset, trial)


def _test_ids(roots: Sequence[Path], dataset: DatasetName, trial: int) -> set[int]:
    """The people whom the protocol tests on, of all roots that have a test side."""
    people: set[int] = set()
    for root in roots:
        with suppress(DatasetError):  # a root of training images only
            people |= LAYOUTS[dataset].test_ids(root, trial)
    return people
