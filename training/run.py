"""A training run from what a user asks for to its checkpoint: what `cmt train` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from model import CheckpointInfo
from model.device import chosen_device
from model.training_facts import TrainingFacts
from training import distributed
from training.datasets import DatasetName, Sample
from training.image_cache import Unreadable, readable_samples
from training.learnt import known_people
from training.recipe import Recipe, load_recipe
from training.samples import TrainingData, facts_of, held_out_samples, training_samples
from training.state import STATE_FILE, TrainingError
from training.trainer import RunOptions, Trainer
from training.validation import Interval, Selection, Validation, without
from training.warm_start import RANDOM_WEIGHTS, InitialWeights

# Where the paper's settings differ between datasets: GeM's exponent.
DEFAULT_RECIPES = {DatasetName.REGDB: "paper-regdb"}
DEFAULT_SHARE = 0.1
DEFAULT_INTERVAL = "5 epochs"


@dataclass(frozen=True)
class TrainingSource:
    """Where the training images are, and whose count.

    dataset: layout of the roots. roots: folders with different people.
    train_ids: identity lists; None: the training side of every root, as its protocol says.
    trial: which of RegDB's ten splits.
    name: of the data set, where it is stated; see `training.learnt`.
    unreadable: "stop" at images that cannot be decoded, or "skip" them.
    """

    dataset: DatasetName
    roots: Sequence[Path]
    train_ids: Sequence[Path] | None = None
    trial: int = 1
    unreadable: Unreadable = "stop"
    name: str | None = None


@dataclass(frozen=True)
class HoldOut:
    """Who is held out of training to be validated on, and what becomes of it.

    selection: whether the last weights become the checkpoint, or the best on these people.
    every: "2000" steps or "5 epochs" between validations; None: five epochs.
    share: of the training identities, in [0, 1]; None: a tenth if `selection` needs one.
    ids: a list of identities in the roots, instead of a share.
    """

    selection: Selection = "last"
    every: str | None = None
    share: float | None = None
    ids: Path | None = None

    def samples(self, source: TrainingSource, samples: Sequence[Sample]) -> list[Sample]:
        """The images of these people, some of `samples` or others of the roots.

        Raises DatasetError, see `held_out_samples`, and TrainingError where nobody is held out
        although `every` asks for validation.
        """
        share = self.share or 0.0
        if self.share is None and self.ids is None and self.selection == "val":
            share = DEFAULT_SHARE
        held_out = held_out_samples(
            samples, source.roots, source.dataset, source.trial, share=share, ids=self.ids
        )
        if self.every is not None and not held_out:
            raise TrainingError(
                "--validate-every needs held-out identities; add --selection val, "
                "--validation-share or --validation-ids"
            )
        return held_out


@dataclass(frozen=True)
class TrainingRequest:
    """A run as it is asked for; nothing of it is checked yet.

    recipe: a name or a file, see `load_recipe`; None: the paper's for the dataset.
    changes: to the recipe, "key=value" each.
    options: its device may be "auto".
    resume: go on with the run in the folder, if there is one.
    save_every, log_every: steps between saved states and between progress lines.
    """

    source: TrainingSource
    options: RunOptions
    hold_out: HoldOut = HoldOut()
    initial: InitialWeights = RANDOM_WEIGHTS
    recipe: str | None = None
    changes: Sequence[str] = ()
    resume: bool = False
    save_every: int = 250
    log_every: int = 50


class PreparedRun(NamedTuple):
    """A trainer before its next step, and what to know of its images, a sentence each."""

    trainer: Trainer
    notes: list[str]


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C after `step` steps; the state after `saved` of them is kept, None where none is."""

    def __init__(self, step: int, saved: int | None) -> None:
        super().__init__(step, saved)
        self.step, self.saved = step, saved


def train_run(
    request: TrainingRequest,
    *,
    begin: Callable[[PreparedRun], object] = lambda _: None,
    end: Callable[[CheckpointInfo], object] = lambda _: None,
) -> CheckpointInfo:
    """Train to the end, in each of the processes that torchrun started → the checkpoint's info.

    begin: called before the first step, end: after the last one, both in the first process only.
    Raises the errors of `prepare_run` and `Trainer.run`, and RunInterrupted for a Ctrl-C while
    training.
    """
    with distributed.process_group(chosen_device(request.options.device)) as device:
        prepared = prepare_run(replace(request, options=replace(request.options, device=device)))
        if distributed.is_first():
            begin(prepared)
        try:
            info = prepared.trainer.run(save_every=request.save_every, log_every=request.log_every)
        except KeyboardInterrupt:
            raise RunInterrupted(prepared.trainer.step, prepared.trainer.saved) from None
        if distributed.is_first():
            end(info)
    return info


def prepare_run(request: TrainingRequest) -> PreparedRun:
    """Read recipe and images, hold people out, decode what is not in the cache, make the trainer.

    request: its device is one of this process, not "auto".
    Raises TrainingError, RecipeError, DatasetError, TrainingSetError, CacheError or StartError,
    and ValueError for an interval that is none.
    """
    source, options = request.source, request.options
    resumable = (options.folder / STATE_FILE).is_file()
    if resumable and not request.resume:
        raise TrainingError(
            f"{options.folder} holds a run already; add --resume to go on with it, or choose "
            "another folder"
        )
    recipe = load_recipe(
        request.recipe or DEFAULT_RECIPES.get(source.dataset, "paper"), request.changes
    )
    if request.initial != RANDOM_WEIGHTS:
        request.initial.network(recipe.model)  # wrong weights are told before images are decoded
    samples = training_samples(source.roots, source.train_ids, source.dataset, source.trial)
    held_out = request.hold_out.samples(source, samples)
    samples = without(samples, {sample.person_id for sample in held_out})
    samples, held_out, skipped = _decoded(request, recipe, samples, held_out)
    selected_on = held_out if request.hold_out.selection == "val" else []
    facts = facts_of(source.dataset, source.trial, samples, source.name, selected_on)
    if skipped:
        facts["skipped_images"] = len(skipped)
    validation = None
    if held_out:
        interval = Interval.parse(request.hold_out.every or DEFAULT_INTERVAL)
        validation = Validation(source.dataset, held_out, interval)
    data = TrainingData(samples, validation, request.hold_out.selection, facts)
    trainer = Trainer(recipe, data, options, request.initial)
    notes = list(skipped)
    start = TrainingFacts.model_validate(trainer.facts).people()
    known = known_people(start, held_out, source.dataset, source.name)
    if validation and known:
        notes.append(
            f"{len(known)} of the {len(validation.identities)} held-out "
            "identities are among those whom the checkpoint of --start learnt from: figures of "
            "validation flatter, hold out others"
        )
    if request.resume and not resumable:
        notes.append(f"There is no state in {options.folder} to resume: the run begins anew.")
    return PreparedRun(trainer, notes)


def _decoded(
    request: TrainingRequest, recipe: Recipe, samples: list[Sample], held_out: list[Sample]
) -> tuple[list[Sample], list[Sample], list[str]]:
    """The samples of both lists that decode, and a sentence for each of the others."""
    cache, unreadable = request.options.cache_folder, request.source.unreadable
    with distributed.first_process_first():
        samples, skipped = readable_samples(
            samples, *recipe.size(recipe.stages[0]), cache, unreadable
        )
        if held_out:  # a damaged one is found now, not at the first validation
            size = recipe.model.input_height, recipe.model.input_width
            held_out, more = readable_samples(held_out, *size, cache, unreadable)
            skipped += more
    return samples, held_out, skipped
