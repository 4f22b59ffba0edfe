"""The training loop: a recipe, samples and a seed → a checkpoint. Interrupt it at any moment."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model import CMT, CheckpointInfo, CMTOutput, save_checkpoint
from model.precision import choose_precision
from training.augmentation import augment
from training.classifiers import PartClassifiers, imprint
from training.datasets.sample import Sample
from training.image_cache import cached_images
from training.losses import (
    hetero_centre_triplet,
    identity_loss,
    modality_consistency,
    modulation_discriminative,
)
from training.recipe import LossWeights, Recipe, Stage
from training.sampler import Batch, IdentityBalancedSampler
from training.start import start_from

STATE_FILE = "state.pt"
CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class Position:
    """Where a step lies: its stage, and its number within the stage."""

    stage: int
    within: int


class Trainer:
    """One run in one folder.

    `run` goes on from the folder's state if there is one, and ends with the same weights as an
    uninterrupted run on the same machine: batches and augmentation are pure functions of seed and
    step, and the state holds weights, averaged weights and the optimiser's moments.
    """

    def __init__(
        self,
        recipe: Recipe,
        samples: Sequence[Sample],
        folder: Path,
        *,
        seed: int = 0,
        device: str = "cpu",
        weights: str | Path | None = None,
        start: Path | None = None,
        cache: Path | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """weights: of the backbone, see `CMT`. start: a checkpoint to go on from, see `start_from`.
        facts: what the checkpoint shall say of its training, beside recipe, seed and time.

        Raises TrainingSetError, TrainingError or StartError before anything is written.
        """
        self.recipe = recipe
        self.samples = samples
        self.folder = folder
        self.seed = seed
        self.device = torch.device(device)
        self.cache = cache or folder / "cache"
        self.facts = dict(facts or {})
        self.precision = choose_precision(self.device.type, recipe.precision)
        self.sampler = IdentityBalancedSampler(samples, recipe.identities, recipe.images, seed)
        self.stage_ends = np.cumsum([self._stage_steps(stage) for stage in recipe.stages])

        torch.manual_seed(seed)
        self.model = CMT(recipe.model, weights=weights)
        self.start = start
        if start is not None:
            self.facts["start"] = start_from(self.model, start).fingerprint
        self.model.to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classifiers = PartClassifiers(
            recipe.model.parts, recipe.model.dim, self.sampler.classes
        ).to(self.device)
        self.averaged = _copy(self.model) if recipe.ema else None
        self.optimiser = torch.optim.Adam(
            self._parameter_groups(), weight_decay=recipe.weight_decay
        )
        self.step = 0
        self.seconds = 0.0

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int(self.stage_ends[-1])

    def run(
        self, *, save_every: int = 250, log_every: int = 50, stop_at: int | None = None
    ) -> CheckpointInfo:
        """Train to the end (or to step `stop_at`), saving state as it goes → the checkpoint's info.

        Raises TrainingError when the loss is not finite, naming the step; the state saved before
        stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        images: tuple[tuple[int, int], np.ndarray] | None = None
        if self.start is not None and self.step == 0:
            size = self.recipe.size(self.recipe.stages[0])
            images = size, cached_images(self.samples, *size, self.cache)
            classes = {person: label for label, person in enumerate(self.sampler.people)}
            imprint(
                self.classifiers,
                self.model,
                images[1],
                [classes[sample.person_id] for sample in self.samples],
                [sample.modality for sample in self.samples],
            )
        end = min(self.steps, stop_at or self.steps)
        started, logged, since = time.monotonic(), self.step, time.monotonic()
        before = self.seconds
        self.model.train()
        while self.step < end:
            stage = self.recipe.stages[self.position(self.step).stage]
            size = self.recipe.size(stage)
            if images is None or images[0] != size:
                images = size, cached_images(self.samples, *size, self.cache)
            values = self._train_step(stage, images[1])
            self.step += 1
            self.seconds = before + time.monotonic() - started
            if self.step % log_every == 0 or self.step == end:
                rate = (self.step - logged) / (time.monotonic() - since)
                self._log(values, rate)
                logged, since = self.step, time.monotonic()
            if self.step % save_every == 0 or self.step == end:
                self._save_state()
                self.save_checkpoint()
        return self.save_checkpoint()

    def save_checkpoint(self) -> CheckpointInfo:
        """Write the run's checkpoint as it is now (averaged weights if the recipe has them)."""
        facts = {
            **self.facts,
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.seed,
            "step": self.step,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "precision": self.precision.reason,
        }
        model = CMT(self.recipe.model)
        model.load_state_dict(self.averaged or self.model.state_dict())
        path = self.folder / CHECKPOINT_FILE
        return save_checkpoint(path, model, training=facts, dtype=torch.float16)

    def position(self, step: int) -> Position:
        """The stage that `step` belongs to, and its number within that stage."""
        stage = int(np.searchsorted(self.stage_ends, step, side="right"))
        start = int(self.stage_ends[stage - 1]) if stage else 0
        return Position(stage, step - start)

    def learning_rate(self, step: int) -> float:
        """Warm-up, then half a cosine from the stage's lr to its lr_end, or constant."""
        at = self.position(step)
        stage = self.recipe.stages[at.stage]
        if at.within < stage.warmup_steps:
            return stage.lr * (at.within + 1) / stage.warmup_steps
        if stage.lr_end is None:
            return stage.lr
        done = (at.within - stage.warmup_steps) / self._stage_steps(stage)
        return stage.lr_end + (stage.lr - stage.lr_end) * 0.5 * (1 + math.cos(math.pi * done))

    def loss_weights(self, step: int) -> LossWeights:
        """The stage's weights, reached from those of the stage before over its fade_steps."""
        at = self.position(step)
        stage = self.recipe.stages[at.stage]
        if at.stage == 0 or at.within >= stage.fade_steps:
            return stage.weights
        earlier = self.recipe.stages[at.stage - 1].weights.model_dump()
        share = at.within / stage.fade_steps
        return LossWeights(
            **{
                name: earlier[name] + share * (target - earlier[name])
                for name, target in stage.weights.model_dump().items()
            }
        )

    def _train_step(self, stage: Stage, cache: np.ndarray) -> dict[str, float]:
        batch = self.sampler.batch(self.step, stage.identities)
        generator = torch.Generator(self.device)
        generator.manual_seed(hash((self.seed, self.step)) % 2**63)
        torch.manual_seed(generator.initial_seed())  # dropout
        is_ir = torch.from_numpy(batch.is_ir).to(self.device)
        pixels = torch.from_numpy(cache[batch.rows]).to(self.device)
        images = augment(pixels, is_ir, self.recipe.augmentation, generator)
        images = images.contiguous(memory_format=torch.channels_last)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(self.step) * group["scale"]
        with torch.autocast(
            self.device.type, self.precision.dtype, enabled=self.precision.autocast
        ):
            output = self.model(images, ["ir" if ir else "rgb" for ir in batch.is_ir])
        # Losses in fp32: distances and centroids are differences of near numbers.
        output = output.float()
        loss, values = self._loss(output, batch, stage)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is not finite at step {self.step} ({_sentence(values)}); lower the "
                "learning rate or train in float32, then resume from the last saved state"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        if self.averaged is not None:
            # The average forgets its start quickly: decay grows with the steps taken.
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            _average(self.averaged, self.model.state_dict(), decay)
        return values

    def _loss(
        self, output: CMTOutput, batch: Batch, stage: Stage
    ) -> tuple[Tensor, dict[str, float]]:
        """Equation (15), and the values to log."""
        recipe, weights = self.recipe, self.loss_weights(self.step)
        labels = torch.from_numpy(batch.labels).to(self.device)
        is_ir = torch.from_numpy(batch.is_ir).to(self.device)
        values: dict[str, float] = {}
        total = torch.zeros((), device=self.device)

        def add(name: str, weight: float, loss: Tensor) -> None:
            nonlocal total
            values[name] = loss.item()
            if weight:
                total = total + weight * loss

        logits = self.classifiers(output.complete)[:, :, : stage.identities]
        add("identity", weights.identity, identity_loss(logits, labels, recipe.label_smoothing))
        flat = output.embedding.flatten(1)
        triplet = hetero_centre_triplet(flat, labels, is_ir, recipe.margin)
        add("triplet", weights.triplet, triplet)
        if weights.triplet_parts:
            per_part = [
                hetero_centre_triplet(part, labels, is_ir, recipe.margin)
                for part in output.embedding.unbind(1)
            ]
            add("triplet_parts", weights.triplet_parts, torch.stack(per_part).mean())
        if output.compensated is not None:
            consistency = modality_consistency(
                output.compensated,
                output.features,
                labels,
                is_ir,
                centroid_gradient=recipe.centroid_gradient,
            )
            add("consistency", weights.consistency, consistency)
        if recipe.model.instance_alignment and weights.modulation:
            modulation = self.model.modulation(output.embedding)
            loss = modulation_discriminative(
                output.embedding,
                modulation,
                labels,
                is_ir,
                form=recipe.modulation_form,
                margin=recipe.margin,
                temperature=recipe.modulation_temperature,
                across_modalities=recipe.modulation_across,
            )
            add("modulation", weights.modulation, loss)
            gamma, beta = modulation
            values["gamma_mean"] = gamma.mean().item()
            values["gamma_std"] = gamma.std(dim=0).mean().item()
            beta_norm = beta.norm(dim=1).mean() * recipe.model.parts**0.5
            values["beta_share"] = (beta_norm / flat.norm(dim=1).mean()).item()
        values["accuracy"] = (logits.sum(1).argmax(1) == labels).float().mean().item()
        values["feature_norm"] = output.features.flatten(1).norm(dim=1).mean().item()
        values["loss"] = total.item()
        return total, values

    def _stage_steps(self, stage: Stage) -> int:
        if stage.steps is not None:
            return stage.steps
        visible = sum(sample.modality == "rgb" for sample in self.samples)
        most = max(visible, len(self.samples) - visible)
        return (stage.epochs or 0) * math.ceil(most / (self.recipe.identities * self.recipe.images))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        generators = [
            parameter
            for name, parameter in self.model.named_parameters()
            if name.startswith("generator_")
        ]
        kept = {id(parameter) for parameter in generators}
        rest = [p for p in self.model.parameters() if id(p) not in kept]
        rest += list(self.classifiers.parameters())
        return [
            {"params": rest, "lr": 0.0, "scale": 1.0},
            {"params": generators, "lr": 0.0, "scale": self.recipe.generator_lr},
        ]

    def _facts_of_run(self) -> dict[str, Any]:
        """What must be the same for a state to be resumed."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.seed,
            "people": self.sampler.people,
        }

    def _save_state(self) -> None:
        """Atomic: an interruption leaves the state saved before."""
        partial = self.folder / f".{STATE_FILE}.partial"
        state = {
            "run": json.dumps(self._facts_of_run()),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "averaged": self.averaged,
            "classifiers": self.classifiers.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / STATE_FILE)

    def _resume(self) -> None:
        path = self.folder / STATE_FILE
        if not path.is_file() or self.step:
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        if json.loads(state["run"]) != json.loads(json.dumps(self._facts_of_run())):
            raise TrainingError(
                f"{self.folder} holds a run of another recipe, seed or set of people; resume with "
                "the same ones, or choose another run folder"
            )
        self.model.load_state_dict(state["model"])
        self.classifiers.load_state_dict(state["classifiers"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.averaged = state["averaged"]
        self.step, self.seconds = state["step"], state["seconds"]

    def _log(self, values: dict[str, float], rate: float) -> None:
        record: dict[str, float] = {
            "step": self.step,
            "lr": self.learning_rate(self.step - 1),
            **values,
            "steps_per_second": rate,
        }
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        left = (self.steps - self.step) / rate / 60
        text = _sentence(values)
        print(f"step {self.step}/{self.steps} {text} {rate:.2f}/s, {left:.0f} min left", flush=True)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _float_pairs(
    averaged: dict[str, Tensor], current: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    for name, tensor in averaged.items():
        if tensor.is_floating_point():
            yield tensor, current[name].detach()
        else:
            tensor.copy_(current[name])


@torch.no_grad()
def _average(averaged: dict[str, Tensor], current: dict[str, Tensor], decay: float) -> None:
    """averaged ← decay·averaged + (1 − decay)·current, batch norm's statistics included."""
    pairs = list(_float_pairs(averaged, current))
    torch._foreach_lerp_([pair[0] for pair in pairs], [pair[1] for pair in pairs], 1 - decay)


def _sentence(values: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3g}" for name, value in values.items())
