"""A checkpoint and held-out people → its calibration, which `cmt calibrate` shows and stores."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from model import CheckpointInfo, load_checkpoint
from training.calibration.calibrate import Fit, fit_calibration
from training.calibration.pairs import held_out_images
from training.datasets import LAYOUTS, DatasetName
from training.evaluation.embedding import embed_samples
from training.learnt import learnt_people, name_of, refuse_known_people


@dataclass(frozen=True)
class CalibrationRequest:
    """A calibration as it is asked for.

    dataset, root: layout and folder of the images. ids: a list of held-out identities.
    name: of the data set, where it is stated; see `training.learnt`.
    prior: share of pairs of one person that the probabilities assume, in (0, 1).
    device: "cpu", "cuda", …. batch_size: images per forward pass. workers: processes that decode
        images; 0 decodes in this one.
    """

    checkpoint: Path
    dataset: DatasetName
    root: Path
    ids: Path
    prior: float = 0.5
    device: str = "cpu"
    batch_size: int = 64
    workers: int = 0
    name: str | None = None


def calibrate_checkpoint(
    request: CalibrationRequest, *, progress: Callable[[str], None] = lambda _: None
) -> tuple[CheckpointInfo, Fit]:
    """Embed the held-out people and fit their curves; the checkpoint stays as it is.

    progress: told what is being done.
    Raises DatasetError for a folder that is not as its layout says, people whom the checkpoint was
    trained on, or too few of them; CheckpointError for a file that is none.
    """
    layout = LAYOUTS[request.dataset]
    ids = layout.read_ids(request.ids)
    model, info = load_checkpoint(request.checkpoint, request.device)
    trial = (info.facts.trial or 1) if layout.trials > 1 else 1
    samples = layout.test(request.root, trial, ids)
    refuse_known_people(info, samples, request.dataset, request.name, selecting_may=True)
    people = learnt_people(request.dataset, name_of(request.dataset, request.name), samples)
    samples = held_out_images(samples)
    progress(f"Embedding {len(samples)} images on {request.device}")
    embedded = embed_samples(model, samples, batch_size=request.batch_size, workers=request.workers)
    fit = fit_calibration(
        *(model, embedded, request.dataset),
        prior=request.prior,
        progress=lambda what: progress(f"Fitting {what}"),
    )
    facts = fit.calibration.facts.model_copy(update={"name": people.name, "images": people.images})
    return info, replace(fit, calibration=replace(fit.calibration, facts=facts))
