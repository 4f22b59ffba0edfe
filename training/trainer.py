"""The training loop: a recipe, samples and a seed → a checkpoint. Interrupt it at any moment."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from model import CMT, CheckpointInfo, Modality, load_checkpoint, save_checkpoint
from model.atomic_file import write_whole
from model.training_facts import TrainingFacts
from training import distributed
from training.acceleration import (
    Acceleration,
    Switch,
    choose_acceleration,
    decide_compile,
    read_decision,
    write_decision,
)
from training.augmentation import augment
from training.averaging import AveragedWeights, copy_of
from training.batches import BatchReader
from training.classifiers import imprint
from training.diagnosis import modulation_verdict, why_not_finite
from training.image_cache import cached_images
from training.learnt import stated_name, united
from training.objective import Labels, Objective
from training.progress import RunProgress, in_words
from training.recipe import Recipe, recipe_yaml, with_later_fields
from training.run_log import VALIDATION, RunLog, plot_curves, read_metrics
from training.sampler import IdentityBalancedSampler
from training.samples import TrainingData
from training.schedule import Schedule
from training.state import TrainingError, read_state, save_state, writing
from training.warm_start import RANDOM_WEIGHTS, InitialWeights

CHECKPOINT_FILE = "checkpoint.safetensors"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class RunOptions:
    """Where a run is written and how it is computed.

    folder: of its state, metrics and checkpoint.
    seed: of weights, batches and augmentation.
    device: "cpu", "cuda" or "cuda:1".
    cache: folder of decoded images; None: inside `folder`.
    channels_last, compile: see `choose_acceleration` and `decide_compile`.
    decisions: folder in which is kept what of these a timing decided; None: `folder`. Runs that are
        to be compared share one.
    """

    folder: Path
    seed: int = 0
    device: str = "cpu"
    cache: Path | None = None
    channels_last: Switch = "auto"
    compile: Switch = "auto"
    decisions: Path | None = None

    @property
    def decision_folder(self) -> Path:
        """Where decisions are kept: in `decisions`, or the run's folder."""
        return self.decisions or self.folder

    @property
    def cache_folder(self) -> Path:
        """Where decoded images are: in `cache`, or inside the run's folder."""
        return self.cache or self.folder / "cache"


class Trainer:
    """One run in one folder.

    It goes on from the folder's state if there is one, and ends with the same weights as an
    uninterrupted run on the same machine: batches and augmentation are pure functions of seed and
    step, and the state holds weights, averaged weights, the optimiser's moments and the best
    weights so far. Under torchrun it is one of several processes that train as one, see
    `training.distributed`.

    step: steps done. saved: after how many of them the last state was saved, None before the first.
    acceleration: what is used on this device, and why.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        options: RunOptions,
        initial: InitialWeights = RANDOM_WEIGHTS,
    ) -> None:
        """Take up the run in the folder of `options`, or begin one with the `initial` weights.

        Raises TrainingSetError, TrainingError or StartError before anything is written.
        """
        _check(recipe, data)
        self.recipe = recipe
        self.data = data
        self.options = options
        self.initial = initial
        self.folder = options.folder
        self.validation = data.validation
        self.device = torch.device(options.device)
        self.sampler = IdentityBalancedSampler(
            data.samples, recipe.identities, recipe.images, options.seed
        )
        self.schedule = Schedule(recipe, data.samples)
        self.share = distributed.share_of(recipe.identities, recipe.images)
        decided = read_decision(options.decision_folder, self.device, recipe.precision)
        if decided is not None:
            self.acceleration = decided.with_channels_last(options.channels_last)
        else:
            self.acceleration = choose_acceleration(
                self.device, recipe.model, self.share.total, recipe.precision, options.channels_last
            )
        self._reader = BatchReader(self.sampler, self.share, pin=self.device.type == "cuda")
        self._images: tuple[tuple[int, int], np.ndarray] | None = None  # of which size, and they
        self._earlier: dict[str, Tensor] = {}

        torch.manual_seed(options.seed)
        self.model, start = initial.network(recipe.model)
        self.facts = {**data.facts, **start, **_united(data.facts, start)}
        distributed.use_global_batch_norm(self.model, self.device)
        self.objective = Objective(recipe, self.model, self.sampler.classes, options.seed)
        self.objective.to(self.device)
        self.averaged = AveragedWeights(self.model, recipe.ema) if recipe.ema else None
        self.optimiser = torch.optim.Adam(
            self._parameter_groups(), weight_decay=recipe.weight_decay
        )
        self.step = 0
        self.saved: int | None = None
        self.seconds = 0.0
        self.validated: dict[str, Any] | None = None  # the last validation: step and figures
        self.best: dict[str, Any] | None = None  # the best one, with its weights
        state = read_state(self.folder, self._description(), _brought_up)
        if state is not None:
            self._load(state)
        self.acceleration = distributed.agreed(self.acceleration)
        self.objective.precision = self.acceleration.precision
        self.model.to(memory_format=self.acceleration.memory_format)  # type: ignore[call-overload]
        self.parallel = distributed.parallel(self.objective)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.schedule.steps

    def run(
        self, *, save_every: int = 250, log_every: int = 50, stop_at: int | None = None
    ) -> CheckpointInfo:
        """Train to the end (or to step `stop_at`), saving state as it goes → the checkpoint's info.

        Raises TrainingError when a loss or gradient is not finite, naming step and likely cause,
        and where the folder cannot be written; the state saved before stays.
        """
        first = distributed.is_first()
        end = min(self.steps, stop_at or self.steps)
        if first:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(self.folder / RECIPE_FILE, recipe_yaml(self.recipe))
        with (
            RunProgress(self.step, self.steps, shown=first) as progress,
            RunLog(self.folder, self.step, written=first) as metrics,
        ):
            if self.initial.checkpoint is not None and self.step == 0:
                progress.say(self._imprint())
            self._decide_compile(progress)
            if first:
                with writing(self.folder):
                    write_decision(self.options.decision_folder, self.acceleration)
            before, started = self.seconds, time.monotonic()
            while self.step < end:
                values = self.train_step()
                self.seconds = before + time.monotonic() - started
                progress.advance(self.step)
                if self.step % log_every == 0 or self.step == end:
                    plain = {name: value.item() for name, value in values.items()}
                    rate = progress.log(self.step, plain)
                    lr = self.schedule.learning_rate(self.step - 1)
                    metrics.write(self.step, {"lr": lr, **plain, "steps_per_second": rate})
                if first and self._validation_is_due():
                    figures = self._validate()
                    progress.say(f"validation at step {self.step}: {in_words(figures)}")
                    metrics.write(
                        self.step, {f"{VALIDATION}{name}": f for name, f in figures.items()}
                    )
                if first and (self.step % save_every == 0 or self.step == end):
                    self._save_state()
                    if self.step < end:
                        self.save_checkpoint()
        return self._finish()

    def train_step(self) -> dict[str, Tensor]:
        """One step of the optimiser on the next batch; its losses and figures, on the device.

        Raises TrainingError when the loss or its gradient is not finite, before any weight changes.
        """
        images, modalities, labels = self._next_batch()
        rate = self.schedule.learning_rate(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        loss, values = self._forward(images, modalities, labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        values["gradient_norm"] = nn.utils.get_total_norm(gradients)
        if not (loss + values["gradient_norm"]).isfinite():
            self._stop(images, modalities, values)
        self.optimiser.step()
        if self.averaged is not None:
            self.averaged.update(self.model, self.step)
        self.step += 1
        self._earlier = values
        return values

    def save_checkpoint(self) -> CheckpointInfo:
        """Write the run's checkpoint as it is now, and return its info.

        The averaged weights if the recipe has them; under selection "val" the best so far.
        """
        facts: dict[str, Any] = {
            **self.facts,
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.options.seed,
            "step": self.step,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "acceleration": self.acceleration.reasons,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "processes": distributed.count(),
            "selection": self.data.selection,
        }
        if self.validation is not None:
            facts["held_out"] = self.validation.identities
            facts["validation"] = self.validated
        weights = self._weights()
        if self.data.selection == "val" and self.best is not None:
            facts |= {"step": self.best["step"], "validation": self.best["validated"]}
            weights = self.best["weights"]
        verdict = modulation_verdict(self.recipe, read_metrics(self.folder))
        if verdict is not None:
            facts["modulation"] = verdict
        with writing(self.folder):
            return save_checkpoint(
                self.folder / CHECKPOINT_FILE,
                self._network(weights),
                training=facts,
                dtype=torch.float16,
            )

    def _imprint(self) -> str:
        """Classifiers for the weights that the run starts from; see `imprint`. Says how good."""
        classes = {person: label for label, person in enumerate(self.sampler.people)}
        losses = imprint(
            self.objective.heads,
            self.model,
            self._pixels(),
            [classes[sample.person_id] for sample in self.data.samples],
            [sample.modality for sample in self.data.samples],
        )
        said = ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
        return (
            f"classifiers start as class means; identity loss per part {said} "
            f"(chance {math.log(len(classes)):.2f})"
        )

    def _pixels(self) -> np.ndarray:
        """All decoded images at the size of the current stage."""
        size = self.recipe.size(self.schedule.stage(self.step))
        if self._images is None or self._images[0] != size:
            with distributed.first_process_first():
                images = cached_images(self.data.samples, *size, self.options.cache_folder)
                self._images = size, images
        return self._images[1]

    def _next_batch(self) -> tuple[Tensor, list[Modality], Labels]:
        """Augmented images and modalities of this process's share, labels of the whole batch."""
        stage = self.schedule.stage(self.step)
        batch, pixels = self._reader.read(self.step, self._pixels(), stage.identities)
        generator = torch.Generator(self.device)
        generator.manual_seed(hash((self.options.seed, self.step)) % 2**63)
        torch.manual_seed(generator.initial_seed() + distributed.rank())  # dropout
        is_ir = torch.from_numpy(batch.is_ir).to(self.device)
        rows = torch.from_numpy(self.share.rows).to(self.device)
        images = augment(
            pixels.to(self.device, non_blocking=True),
            is_ir[rows],
            self.recipe.augmentation,
            generator,
            total=self.share.total,
            rows=rows,
        )
        modalities: list[Modality] = ["ir" if ir else "rgb" for ir in batch.is_ir[self.share.rows]]
        labels = Labels(torch.from_numpy(batch.labels).to(self.device), is_ir)
        images = images.contiguous(memory_format=self.acceleration.memory_format)
        return images, modalities, labels

    def _forward(
        self, images: Tensor, modalities: list[Modality], labels: Labels
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.objective.train()
        frozen = self.schedule.stage(self.step).features_frozen
        for module in (self.model.backbone, self.model.parts):
            module.train(not frozen and not self.recipe.frozen_batch_norm)
            module.requires_grad_(not frozen)
        loss, values = self.parallel(
            images,
            modalities,
            self.share,
            labels,
            self.schedule.loss_weights(self.step),
            self.schedule.stage(self.step).identities,
        )
        return loss, values

    def _decide_compile(self, progress: RunProgress) -> None:
        """torch.compile, where it pays for the steps that are left; see `decide_compile`."""
        if self.step == self.steps:
            return
        batch = self._next_batch()

        def trial() -> None:
            loss, _ = self._forward(*batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimiser.zero_grad(set_to_none=True)

        before = copy_of(self.model)  # forward changes batch norm's statistics
        self.acceleration = decide_compile(
            self.acceleration,
            self.model,
            trial,
            self.device,
            self.options.compile,
            self.steps - self.step,
            distributed.count(),
        )
        self.model.load_state_dict(before)
        progress.say(self.acceleration.compile_reason)

    def _stop(
        self, images: Tensor, modalities: list[Modality], values: Mapping[str, Tensor]
    ) -> NoReturn:
        plain, earlier = (
            {name: value.item() for name, value in of.items()} for of in (values, self._earlier)
        )
        rate = self.schedule.learning_rate(self.step)
        cause = why_not_finite(self.objective, images, modalities, plain, earlier, rate)
        raise TrainingError(
            f"loss or gradient is not finite at step {self.step} ({in_words(plain)}): {cause}; the "
            "state saved before that step is intact"
        )

    def _validation_is_due(self) -> bool:
        if self.validation is None:
            return False
        every = self.validation.every.steps(self.schedule.epoch)
        return self.step % every == 0 or self.step == self.steps

    def _validate(self) -> dict[str, float]:
        """Figures of the weights that would be saved now; keeps the weights if they are best."""
        assert self.validation is not None
        figures = self.validation.figures(self._network(self._weights()).to(self.device))
        self.validated = {"step": self.step, **figures}
        if self.data.selection == "val" and (
            self.best is None or figures["map"] > self.best["validated"]["map"]
        ):
            weights = {name: tensor.cpu().clone() for name, tensor in self._weights().items()}
            self.best = {"step": self.step, "validated": self.validated, "weights": weights}
        return figures

    def _finish(self) -> CheckpointInfo:
        """Draw the curves if this is the end, and write the checkpoint → its info."""
        with distributed.first_process_first():
            if not distributed.is_first():
                return load_checkpoint(self.folder / CHECKPOINT_FILE)[1]
            if self.step == self.steps:
                plot_curves(self.folder)
            return self.save_checkpoint()

    def _weights(self) -> dict[str, Tensor]:
        """What is saved and validated: the averaged weights if the recipe has them."""
        return self.model.state_dict() if self.averaged is None else self.averaged.weights

    def _network(self, weights: Mapping[str, Tensor]) -> CMT:
        """A network of its own with `weights`, on the CPU."""
        model = CMT(self.recipe.model)
        model.load_state_dict(weights)
        return model.eval()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The classifiers at the recipe's rate, each part of the network at its own multiple."""
        scales = {
            ("backbone.", "parts."): self.recipe.features_lr,
            ("alignment.",): self.recipe.alignment_lr,
            ("generator_",): self.recipe.generator_lr,
        }
        groups: list[dict[str, Any]] = [
            {
                "params": [p for n, p in self.model.named_parameters() if n.startswith(names)],
                "lr": 0.0,
                "scale": scale,
            }
            for names, scale in scales.items()
        ]
        scaled = {id(parameter) for group in groups for parameter in group["params"]}
        rest = [p for p in self.objective.parameters() if id(p) not in scaled]
        return [{"params": rest, "lr": 0.0, "scale": 1.0}, *groups]

    def _description(self) -> dict[str, Any]:
        """What must be the same for a state to be resumed."""
        images = [(s.person_id, s.camera, s.modality, s.path.name) for s in self.data.samples]
        own = TrainingFacts.model_validate(self.data.facts).people()
        description = {
            "seed": self.options.seed,
            "people": f"{self.sampler.classes} ({_digest(self.sampler.people)})",
            "training images": f"{len(images)} ({_digest(images)})",
            "dataset name": stated_name(own[0]) if own else None,
            "selection": self.data.selection,
            "start": self.facts.get("start"),
            "weights": self.facts.get("weights"),
        }
        if self.validation is not None:
            held_out = self.validation.identities
            description["held-out identities"] = f"{len(held_out)} ({_digest(held_out)})"
            description["steps between validations"] = self.validation.every.steps(
                self.schedule.epoch
            )
        return description | self.recipe.model_dump(mode="json")

    def _save_state(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "acceleration": asdict(self.acceleration),
            "objective": self.objective.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.weights,
            "optimiser": self.optimiser.state_dict(),
            "validated": self.validated,
            "best": self.best,
        }
        save_state(self.folder, self._description(), state)
        self.saved = self.step

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.saved = self.step
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.averaged is not None:
            self.averaged.weights = {
                name: tensor.to(self.device) for name, tensor in state["averaged"].items()
            }
        self.validated, self.best = state["validated"], state["best"]
        self.acceleration = self.acceleration.resumed(
            Acceleration(**state["acceleration"]), self.options.channels_last
        )


def _brought_up(saved: dict[str, Any]) -> dict[str, Any]:
    """A description that an earlier release saved, with the recipe's fields of this one."""
    recipe = {name: value for name, value in saved.items() if name in Recipe.model_fields}
    return {**saved, **with_later_fields(recipe)}


def _united(*facts: Mapping[str, Any]) -> dict[str, Any]:
    """The people whom a run learns from or is selected on, and those of its start."""
    each = [TrainingFacts.model_validate(of) for of in facts]
    learnt_from = united(one for of in each for one in of.people())
    selected_on = united(one for of in each for one in of.selecting_people())
    people = {"learnt_from": learnt_from, "selected_on": selected_on}
    return {name: [one.model_dump() for one in of] for name, of in people.items()}


def _check(recipe: Recipe, data: TrainingData) -> None:
    if data.selection == "val" and data.validation is None:
        raise TrainingError("--selection val needs held-out identities; give --validation-share")
    if recipe.identities % distributed.count():
        raise TrainingError(
            f"the {recipe.identities} identities of a batch cannot be shared out evenly to "
            f"{distributed.count()} processes; start a number of processes that divides them"
        )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
