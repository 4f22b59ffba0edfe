"""A checkpoint and held-out people → its calibration, which `cmt calibrate` shows and stores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model import CheckpointInfo, load_checkpoint
from model.training_facts import LearntPeople
from training.calibration.calibrate import Fit, fit_calibration
from training.calibration.pairs import held_out_images
from training.datasets import LAYOUTS, DatasetError, DatasetName, Sample
from training.evaluation.embedding import embed_samples
from training.learnt import known_people, learnt_people, name_of, refuse_known_people


@dataclass(frozen=True)
class PeopleList:
    """One set: root: the folder of its images. ids: a list of held-out identities. name: of the
    data set, where it is stated; see `training.learnt`."""

    root: Path
    ids: Path
    name: str | None = None


@dataclass(frozen=True)
class CalibrationRequest:
    """A calibration as it is asked for.

    dataset: layout of all sets.
    prior: share of pairs of one person that similarities assume, in (0, 1).
    device: "cpu", "cuda", …. batch_size: images per forward pass. workers: processes that decode
        images; 0 decodes in this one.
    """

    checkpoint: Path
    dataset: DatasetName
    sets: Sequence[PeopleList]
    prior: float = 0.5
    device: str = "cpu"
    batch_size: int = 64
    workers: int = 0


def calibrate_checkpoint(
    request: CalibrationRequest, *, progress: Callable[[str], None] = lambda _: None
) -> tuple[CheckpointInfo, Fit]:
    """Embed the held-out people and fit all that the checkpoint says of ranking.

    The checkpoint stays as it is. progress: told what is being done.
    Raises DatasetError for a folder that is not as its layout says, people whom the checkpoint was
    trained on or who are in two sets, or too few of them; CheckpointError for a file that is none.
    """
    layout = LAYOUTS[request.dataset]
    lists = [layout.read_ids(one.ids) for one in request.sets]
    model, info = load_checkpoint(request.checkpoint, request.device)
    trial = (info.facts.trial or 1) if layout.trials > 1 else 1
    chosen: list[tuple[list[Sample], LearntPeople]] = []
    for one, ids in zip(request.sets, lists, strict=True):
        samples = layout.test(one.root, trial, ids)
        refuse_known_people(info, samples, request.dataset, one.name, selecting_may=True)
        _refuse_same_people(one, samples, [people for _, people in chosen], request.dataset)
        people = learnt_people(request.dataset, name_of(request.dataset, one.name), samples)
        chosen.append((held_out_images(samples), people))
    sets = []
    for samples, people in chosen:
        progress(f"Embedding {len(samples)} images on {request.device}")
        embedded = embed_samples(
            model, samples, batch_size=request.batch_size, workers=request.workers
        )
        sets.append((embedded, people))
    fit = fit_calibration(
        *(model, sets, request.dataset),
        prior=request.prior,
        progress=lambda what: progress(f"Fitting {what}"),
    )
    return info, fit


def _refuse_same_people(
    one: PeopleList,
    samples: Sequence[Sample],
    others: Sequence[LearntPeople],
    dataset: DatasetName,
) -> None:
    if twice := known_people(others, samples, dataset, one.name):
        raise DatasetError(
            f"{len(twice)} of the identities in {one.ids} are in a list before it: what is fitted "
            "on one set is judged by another; list everybody once, or if they only have the same "
            "numbers, name the sets with --dataset-name."
        )
