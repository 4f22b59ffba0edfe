"""Evaluate one checkpoint, or one per trial: what `cmt evaluate` does.

Also which checkpoints may share a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from model import CheckpointInfo, load_checkpoint
from training.datasets import LAYOUTS, DatasetError, DatasetName, Sample
from training.evaluation.protocols import mixed_splits, protocol_splits
from training.evaluation.report import Evaluation, ModelScores, score_model, summarise
from training.evaluation.sysu import TRIAL_FILE
from training.learnt import known_people, refuse_known_people

TRIAL_FIELD = "{trial}"


class GalleryChoice(StrEnum):
    """How galleries are drawn, where public code has two ways.

    SYSU-MM01: AUTO takes the OFFICIAL draws where they are there, else SEEDED ones. LLCM: AUTO is
    SEEDED; AUTHORS is what the scripts of its authors compute, see `protocol_splits`.
    """

    AUTO = "auto"
    OFFICIAL = "official"
    SEEDED = "seeded"
    AUTHORS = "authors"


class ProtocolChoice(StrEnum):
    """OWN is the data set's protocol; MIXED has galleries of both modalities, `mixed_splits`."""

    OWN = "own"
    MIXED = "mixed"


@dataclass(frozen=True)
class EvaluationRequest:
    """An evaluation as it is asked for.

    dataset, root: layout and folder of the images.
    checkpoint: a file, or a pattern with "{trial}" for one file per trial.
    ids: a list of identities to evaluate on; None: the protocol's test side.
    name: of the data set, where it is stated; see `training.learnt`.
    trial: of RegDB; None: the checkpoint's own, or all for which the pattern has a file.
    galleries: of SYSU-MM01 and LLCM.
    protocol: of the data set, or galleries of both modalities.
    rerank: whether to re-rank as published as well, see `k_reciprocal`.
    mirror: whether to compare with the other choice of mirror image as well.
    device: "cpu", "cuda", …. batch_size: images per forward pass. workers: processes that decode
        images; 0 decodes in this one.
    """

    dataset: DatasetName
    root: Path
    checkpoint: str
    ids: Path | None = None
    trial: int | None = None
    galleries: GalleryChoice = GalleryChoice.AUTO
    rerank: bool = False
    protocol: ProtocolChoice = ProtocolChoice.OWN
    mirror: bool = False
    device: str = "cpu"
    batch_size: int = 64
    workers: int = 0
    name: str | None = None


@dataclass(frozen=True)
class ScoredCheckpoint:
    """One checkpoint of an evaluation.

    selection: see `selection_of`.
    trial: the split that it was evaluated on; None for a dataset with one split.
    calibrated_on: see `calibrated_on`.
    samples: the test images. scores: what the network makes of them.
    """

    file: Path
    fingerprint: str
    selection: str
    trial: int | None
    calibrated_on: int | None
    samples: Sequence[Sample]
    scores: ModelScores

    def to_json(self) -> dict[str, Any]:
        """Which checkpoint it is, as plain values; without samples and scores."""
        entry: dict[str, Any] = {
            "file": self.file.name,
            "fingerprint": self.fingerprint,
            "selection": self.selection,
        }
        if self.calibrated_on is not None:
            entry["calibrated_on_evaluated"] = self.calibrated_on
        return entry if self.trial is None else entry | {"trial": self.trial}


@dataclass(frozen=True)
class CheckpointEvaluation:
    """The figures over all trials of all checkpoints, and the checkpoints."""

    evaluation: Evaluation
    checkpoints: list[ScoredCheckpoint]

    @property
    def fitted_on(self) -> int:
        """How many of the people evaluated some calibration was fitted on."""
        return max(checkpoint.calibrated_on or 0 for checkpoint in self.checkpoints)

    def to_json(self) -> dict[str, Any]:
        """All as plain values."""
        checkpoints = [checkpoint.to_json() for checkpoint in self.checkpoints]
        return {"checkpoints": checkpoints} | self.evaluation.to_json()


def evaluate_checkpoints(
    request: EvaluationRequest,
    *,
    working: Callable[[str], AbstractContextManager[object]] = nullcontext,
    scored: Callable[[ScoredCheckpoint], object] = lambda _: None,
) -> CheckpointEvaluation:
    """Score every checkpoint on identities that it was not trained on, and summarise.

    working: makes the context for the part that takes long, from what is being done.
    scored: told of each checkpoint as soon as it has scores.
    Raises DatasetError for a folder that is not as its layout says, identities that a checkpoint
    was trained on, or checkpoints that one table must not mix; CheckpointError for a file that is
    none; ValueError where no query has a positive or a network's output is not finite.
    """
    layout = LAYOUTS[request.dataset]
    ids = None if request.ids is None else layout.read_ids(request.ids)
    sysu = request.dataset is DatasetName.SYSU
    trial_file = trial_file_of(request.root, request.galleries) if sysu else None
    checkpoints: list[ScoredCheckpoint] = []
    for trial, file in checkpoint_files(request.dataset, request.checkpoint, request.trial):
        model, info = load_checkpoint(file, request.device)
        if trial is None:  # a checkpoint of RegDB says which split it is of
            trial = (info.facts.trial or 1) if layout.trials > 1 else 1
        samples = layout.test(request.root, trial, ids)
        refuse_known_people(info, samples, request.dataset, request.name)
        if checkpoints:
            _refuse_other_selection(file, selection_of(info), checkpoints[0])
        authors = request.galleries is GalleryChoice.AUTHORS
        splits = (
            mixed_splits(request.dataset, samples)
            if request.protocol is ProtocolChoice.MIXED
            else protocol_splits(request.dataset, samples, trial_file=trial_file, authors=authors)
        )
        shared = calibrated_on(info, samples, request.dataset, request.name)
        with working(f"Embedding and ranking {len(samples)} images on {request.device}"):
            scores = score_model(
                *(model, samples, splits),
                calibration=info.calibration,
                judged=not shared,
                rerank=request.rerank,
                compare_mirror=request.mirror,
                batch_size=request.batch_size,
                workers=request.workers,
            )
        checkpoints.append(
            ScoredCheckpoint(
                file=file,
                fingerprint=info.fingerprint,
                selection=selection_of(info),
                trial=trial if layout.trials > 1 else None,
                calibrated_on=shared,
                samples=samples,
                scores=scores,
            )
        )
        scored(checkpoints[-1])
    evaluation = summarise(request.dataset, [checkpoint.scores for checkpoint in checkpoints])
    return CheckpointEvaluation(evaluation, checkpoints)


def selection_of(info: CheckpointInfo) -> str:
    """How a run chose its weights: "last", or "val" by validation; early runs had no choice."""
    return info.facts.selection or "last"


def calibrated_on(
    info: CheckpointInfo, samples: Sequence[Sample], dataset: DatasetName, name: str | None
) -> int | None:
    """How many of the people of `samples` the calibration was fitted on; None without one."""
    if info.calibration is None:
        return None
    return len(known_people(info.calibration.facts.people, samples, dataset, name))


def checkpoint_files(
    dataset: DatasetName, checkpoint: str, trial: int | None
) -> Iterator[tuple[int | None, Path]]:
    """(trial, file) of every network to evaluate; the trial is None where only it can tell.

    Raises DatasetError for a pattern where the dataset has no trials, and for a trial that does not
    exist or has no file.
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


def trial_file_of(root: Path, galleries: GalleryChoice) -> Path | None:
    """SYSU-MM01's file of official trials, None to draw seeded ones.

    Raises DatasetError where the official trials are asked for and not there.
    """
    path = root / TRIAL_FILE
    if galleries is GalleryChoice.OFFICIAL and not path.is_file():
        raise DatasetError(
            f"Expected the official trial file {path}, but there is no such file",
            DatasetName.SYSU,
        )
    return None if galleries is GalleryChoice.SEEDED else path


def _refuse_other_selection(file: Path, selection: str, first: ScoredCheckpoint) -> None:
    """Weights that were chosen on held-out people are not comparable with a run's last ones."""
    if selection != first.selection:
        raise DatasetError(
            f"{file} was selected by '{selection}' and {first.file.name} by "
            f"'{first.selection}': one table never mixes the two; train all trials with the same "
            "--selection"
        )
