"""Recipes: how a checkpoint is trained, as data. The default is the paper's (§4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.config import BACKBONE_STRIDE, CMTConfig
from training.augmentation import AugmentationConfig
from training.losses import ModulationForm

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be read; the message says where and why."""


class LossWeights(BaseModel):
    """Equation (15): L_ID = identity + triplet, consistency = both L_cyc, modulation = λ.

    `identity` is of the mean over all images, half of (10), which adds the modalities' means.

    Two more, 0 in the paper's recipe: `triplet_parts`, of the triplet of every part, averaged over
    the parts (HCT's public code adds them up: its weight 2 for six parts is 12 here), and
    `identity_features`, the identity loss of the raw part features F beside that of the complete
    ones. Without it nothing asks F to tell people apart, and from random initialisation the
    compensation memorises the training people instead: see docs/training.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: float = Field(default=1.0, ge=0)
    identity_features: float = Field(default=0.0, ge=0)
    triplet: float = Field(default=1.0, ge=0)
    triplet_parts: float = Field(default=0.0, ge=0)
    consistency: float = Field(default=1.0, ge=0)
    modulation: float = Field(default=0.2, ge=0)


class Stage(BaseModel):
    """A part of the run. Give `steps` or `epochs`.

    An epoch is ⌈max(visible, infrared images) / (identities · images)⌉ batches. After
    `warmup_steps`, in which it rises linearly, the learning rate goes from `lr` to `lr_end` (half a
    cosine), or stays. Loss weights move linearly from those of the stage before over the first
    `fade_steps`. `features_frozen` keeps what computes F as it is, batch norm's statistics too,
    while what reads F learns: a head that fits already distorts the features of a good start less
    (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution", ICLR 2022). Such steps are cheaper.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    lr: float = Field(gt=0)
    lr_end: float | None = Field(default=None, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    fade_steps: int = Field(default=0, ge=0)
    input_height: int | None = None
    input_width: int | None = None
    # Curriculum: only the first identities of the list (from random initialisation, hundreds of
    # classes at once stay at chance for long).
    identities: int | None = Field(default=None, ge=2)
    features_frozen: bool = False
    weights: LossWeights = LossWeights()

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("a stage has either steps or epochs")
        w = self.weights
        if not (w.identity or w.identity_features or w.triplet or w.triplet_parts):
            raise ValueError("a stage needs weight on an identity loss or a triplet")
        return self


class Recipe(BaseModel):
    """Everything that decides a run besides data and seed.

    Where the paper is silent: margin 0.3 (HCT's), centroids as fixed targets of L_cyc, the form of
    L_mod, no label smoothing, no weight averaging. `identities` N and `images` K per identity and
    modality make a batch of 2·N·K images. `compensation_gradient`: whether the losses of F̂ reach
    F, from which it is computed. `modulation_form`, `modulation_temperature`, `modulation_across`:
    see `training.losses.modulation_discriminative`. `modulation_without_generators`: L_mod although
    the network has no g_γ, g_β (no instance alignment), with γ = 1 and β = 0; it then trains F
    alone, which tells what L_mod gives from what modulation gives. The classifiers learn at a
    stage's learning rate; `features_lr`, `alignment_lr` and `generator_lr` multiply it for what
    computes F, for the modality alignment, and for g_γ and g_β. `frozen_batch_norm`: normalise F by
    the statistics that the run starts with, those of a whole training set in place of a batch's.
    `ema` is the decay of the averaged weights that are saved (0 saves the last ones).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: CMTConfig = CMTConfig()
    stages: tuple[Stage, ...] = (
        Stage(epochs=60, lr=3.5e-4),
        Stage(epochs=30, lr=3.5e-5),
        Stage(epochs=30, lr=3.5e-6),
    )
    identities: int = Field(default=8, ge=2)
    images: int = Field(default=8, ge=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    margin: float = Field(default=0.3, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    centroid_gradient: bool = False
    compensation_gradient: bool = True
    modulation_form: ModulationForm = "batch_hard"
    modulation_temperature: float = Field(default=0.1, gt=0)
    modulation_across: bool = False
    modulation_without_generators: bool = False
    features_lr: float = Field(default=1.0, gt=0)
    alignment_lr: float = Field(default=1.0, gt=0)
    generator_lr: float = Field(default=1.0, gt=0)
    frozen_batch_norm: bool = False
    ema: float = Field(default=0.0, ge=0, lt=1)
    augmentation: AugmentationConfig = AugmentationConfig()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        if not self.stages:
            raise ValueError("a recipe has at least one stage")
        for number, stage in enumerate(self.stages, 1):
            height = stage.input_height or self.model.input_height
            if height % (BACKBONE_STRIDE * self.model.parts):
                raise ValueError(
                    f"stage {number}: input_height {height} is not a multiple of "
                    f"{BACKBONE_STRIDE * self.model.parts} ({self.model.parts} parts)"
                )
        return self

    def size(self, stage: Stage) -> tuple[int, int]:
        """Height and width of the images of a stage."""
        return (
            stage.input_height or self.model.input_height,
            stage.input_width or self.model.input_width,
        )


def load_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """A recipe by the name of one that ships with the package, or by the path of a YAML file.

    changes: "key=value" each, keys dotted and values YAML: "margin=0.5", "stages.0.lr=1e-4".
    Raises RecipeError with the place and the reason.
    """
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise RecipeError(f"no recipe {name!r}; use one of {known}, or the path of a YAML file")
    recipe = _validated(_yaml(path.read_text(encoding="utf-8"), path) or {}, path)
    if not changes:
        return recipe
    # Defaults included, so that any key can be named; all changes at once, so that two that only
    # fit together may come in any order.
    values = recipe.model_dump(mode="json")
    for change in changes:
        _change(values, change)
    return _validated(values, "--set")


def with_later_fields(written: Any) -> Any:
    """A recipe's plain values as an earlier release wrote them → as this one does.

    Fields that have come since are at their defaults, which do what was done before there was the
    field. What is no recipe of this release is handed back as it is.
    """
    try:
        return Recipe.model_validate(written).model_dump(mode="json")
    except ValidationError:
        return written


def recipe_yaml(recipe: Recipe) -> str:
    """All of a recipe, defaults included, as `load_recipe` reads it."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    return text


def _change(values: dict[str, Any], change: str) -> None:
    """Put the value of "key=value" into its place among `values`."""
    key, equals, text = change.partition("=")
    if not equals:
        raise RecipeError(f"--set {change} has no value; write for example --set margin=0.5")
    *path, last = [int(word) if word.isdecimal() else word for word in key.split(".")]
    place: Any = values
    try:
        for word in path:
            place = place[word]
        place[last]  # a new key is a misspelt one
    except (LookupError, TypeError) as error:
        raise RecipeError(f"--set {key}: the recipe has no such key") from error
    place[last] = _yaml(text, f"--set {key}")


def _yaml(text: str, where: object) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is no YAML: {error}") from error


def _validated(values: Any, where: object) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{where}: {key}: {message}" if key else f"{where}: {message}") from error
