"""The checkpoints of an evaluation: one, or one per trial, and who may be evaluated with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path

from model import CheckpointInfo
from training.datasets import LAYOUTS, DatasetError, DatasetName
from training.evaluation.sysu import TRIAL_FILE

TRIAL_FIELD = "{trial}"


class Convention(StrEnum):
    """Who draws SYSU-MM01's galleries."""

    AUTO = "auto"
    OFFICIAL = "official"
    SEEDED = "seeded"


def selection_of(info: CheckpointInfo) -> str:
    """How a run chose its weights: "last", or "val" by validation; early runs had no choice."""
    return str(info.training.get("selection", "last"))


def refuse_training_identities(
    info: CheckpointInfo, dataset: str, identities: Sequence[int]
) -> None:
    """Figures on people that a network was trained on say nothing about others.

    Raises:
        DatasetError: the checkpoint was trained on some of the identities, by its own record.
    """
    if info.training.get("dataset") != dataset:
        return
    known = sorted(set(identities) & {int(i) for i in info.training.get("identities", [])})
    if known:
        raise DatasetError(
            f"The checkpoint was trained on {len(known)} of these {len(identities)} identities "
            f"({', '.join(map(str, known[:5]))}{', …' if len(known) > 5 else ''}); choose others "
            "with --ids."
        )


def calibrated_on(
    info: CheckpointInfo, dataset: DatasetName, identities: Sequence[int]
) -> int | None:
    """How many of the identities the calibration was fitted on; None without a calibration."""
    if info.calibration is None:
        return None
    facts = info.calibration.facts
    return len(set(identities) & set(facts.identities)) if facts.dataset == dataset else 0


def checkpoint_files(
    dataset: DatasetName, checkpoint: str, trial: int | None
) -> Iterator[tuple[int | None, Path]]:
    """(trial, file) of every network to evaluate; the trial is None where only it can tell.

    Raises:
        DatasetError: a pattern for a dataset without trials, or a trial that does not exist or
            has no file.
    """
    layout = LAYOUTS[dataset]
    if trial is not None:
        layout.check_trial(trial)
    if TRIAL_FIELD not in checkpoint:
        yield trial, Path(checkpoint)
        return
    if layout.trials == 1:
        raise DatasetError(
            f"{layout.title} has one split; name one checkpoint without {TRIAL_FIELD}", dataset
        )
    numbers = range(1, layout.trials + 1) if trial is None else [trial]
    files = [(number, Path(checkpoint.replace(TRIAL_FIELD, str(number)))) for number in numbers]
    missing = [file for _, file in files if not file.is_file()]
    if missing:  # before hours go into the others
        raise DatasetError(
            f"Expected the checkpoint {missing[0]} ({len(missing)} missing in all): {layout.title} "
            f"has one for each of its {layout.trials} trials; train it with --trial, or evaluate "
            "one with --trial",
            dataset,
        )
    yield from files


def trial_file_of(root: Path, convention: Convention) -> Path | None:
    """SYSU-MM01's file of official trials, None to draw seeded ones.

    Raises:
        DatasetError: the official trials are asked for and not there.
    """
    path = root / TRIAL_FILE
    if convention is Convention.OFFICIAL and not path.is_file():
        raise DatasetError(
            f"Expected the official trial file {path}, but there is no such file",
            DatasetName.SYSU,
        )
    return None if convention is Convention.SEEDED else path
