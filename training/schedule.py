"""Where a step lies in its recipe: stage, learning rate and loss weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from training.datasets.sample import Sample
from training.recipe import LossWeights, Recipe, Stage


class Position(NamedTuple):
    """A step's stage (from 0), and its number within that stage."""

    stage: int
    within: int


class Schedule:
    """A recipe's stages laid out in steps, for a set of samples (which makes an epoch's length).

    epoch: steps of an epoch, see `Stage`.
    steps: steps of the whole run.
    """

    def __init__(self, recipe: Recipe, samples: Sequence[Sample]) -> None:
        visible = sum(sample.modality == "rgb" for sample in samples)
        most = max(visible, len(samples) - visible)
        self.recipe = recipe
        self.epoch = math.ceil(most / (recipe.identities * recipe.images))
        self._lengths = [stage.steps or (stage.epochs or 0) * self.epoch for stage in recipe.stages]
        self._ends = np.cumsum(self._lengths)
        self.steps = int(self._ends[-1])

    def position(self, step: int) -> Position:
        """The stage that `step` belongs to, and its number within that stage."""
        stage = int(np.searchsorted(self._ends, step, side="right"))
        return Position(stage, step - int(self._ends[stage - 1] if stage else 0))

    def stage(self, step: int) -> Stage:
        """The stage that `step` belongs to."""
        return self.recipe.stages[self.position(step).stage]

    def learning_rate(self, step: int) -> float:
        """Warm-up, then half a cosine from the stage's lr to its lr_end, or constant."""
        at = self.position(step)
        stage = self.recipe.stages[at.stage]
        if at.within < stage.warmup_steps:
            return stage.lr * (at.within + 1) / stage.warmup_steps
        if stage.lr_end is None:
            return stage.lr
        done = (at.within - stage.warmup_steps) / self._lengths[at.stage]
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
