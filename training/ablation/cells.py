"""Cells: trainings from one start that differ in one thing, each evaluated alike, restartable.

A cell owns a folder. `settings.json` says what it is and is compared before anything goes on;
`result.json` is written last and marks it as finished. In between the trainer's own state resumes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model import CMT, CheckpointInfo, load_checkpoint
from model.machine import machine
from training.ablation.controls import choose_strength, with_controls
from training.ablation.results import CellResult, ChosenStrength, SearchResult, write_json
from training.acceleration import Switch
from training.datasets import LAYOUTS, DatasetName, Sample
from training.evaluation.embedding import embed_samples
from training.evaluation.protocols import protocol_splits
from training.evaluation.report import score_model, summarise
from training.evaluation.splits import Split
from training.evaluation.sysu import TRIAL_FILE
from training.learnt import known_people, learnt_people, name_of, refuse_known_people
from training.recipe import Recipe, with_later_fields
from training.samples import TrainingData, facts_of, training_samples
from training.trainer import CHECKPOINT_FILE, RunOptions, Trainer
from training.warm_start import RANDOM_WEIGHTS, InitialWeights

SETTINGS_FILE = "settings.json"
RESULT_FILE = "result.json"


class AblationError(ValueError):
    """An ablation that would not compare like with like; the message says what to change."""


@dataclass(frozen=True)
class Start:
    """Where a cell's first weights come from; one of three.

    checkpoint: a network without either module.
    weights: ImageNet weights of the backbone, as `cmt train --weights`.
    pretraining: the recipe of a network to train first, its modules off, in the folder `name`.
    """

    checkpoint: Path | None = None
    weights: str | None = None
    pretraining: Recipe | None = None
    name: str = "pretrain"


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation. `row` says what is special about it, in a folder's name."""

    row: str
    seed: int
    recipe: Recipe
    start: Start

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        return f"{self.row}-seed{self.seed}"


@dataclass(frozen=True)
class AblationData:
    """Images to train on, images to test on, and the protocol's searches over the latter.

    name: of the data set, where it is stated; see `training.learnt`. selection: images of further
    people, on whom the strength of modulation is chosen; none where it is not.
    """

    dataset: DatasetName
    training: Sequence[Sample]
    test: Sequence[Sample]
    splits: Sequence[Split]
    facts: dict[str, Any]
    name: str | None = None
    selection: Sequence[Sample] = ()


@dataclass
class Budget:
    """How much one call may do; the next call goes on. None is no limit."""

    cells: int | None = None
    minutes: float | None = None
    started: float = field(default_factory=time.monotonic)

    def spent(self) -> bool:
        """Whether nothing more may begin."""
        return self.cells == 0 or self.out_of_time()

    def out_of_time(self) -> bool:
        """Whether the minutes are over, so that a cell stops at its next saved state."""
        return self.minutes is not None and time.monotonic() - self.started >= 60 * self.minutes

    def take_cell(self) -> None:
        """Count a cell that was just finished."""
        if self.cells is not None:
            self.cells -= 1


@dataclass(frozen=True)
class _Origin:
    """A start that exists: the weights to begin with, and what a cell's settings say of them."""

    weights: InitialWeights
    facts: dict[str, Any]


def switched(
    recipe: Recipe,
    *,
    modality_alignment: bool,
    instance_alignment: bool,
    plain_l_mod: bool = False,
) -> Recipe:
    """`recipe` with each module on or off. The losses of a module that is off vanish with it.

    plain_l_mod: but for L_mod, which then has γ = 1, β = 0 and trains F alone.
    """
    changed = changed_model(
        recipe, modality_alignment=modality_alignment, instance_alignment=instance_alignment
    )
    return changed.model_copy(update={"modulation_without_generators": plain_l_mod})


def changed_model(recipe: Recipe, **changes: Any) -> Recipe:
    """`recipe` with other fields of its network, validated.

    Raises AblationError where the recipe's sizes do not allow them.
    """
    content = recipe.model_dump(mode="json")
    content["model"] |= changes
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        changed = ", ".join(f"{name} {value}" for name, value in changes.items())
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise AblationError(f"the recipe does not allow {changed}: {reason}") from error


def read_data(
    dataset: DatasetName,
    roots: Sequence[Path],
    train_ids: Sequence[Path] | None,
    test_root: Path,
    test_ids: Path | None,
    trial: int = 1,
    name: str | None = None,
    selection: tuple[Path, Path | None] | None = None,
) -> AblationData:
    """What every cell trains and is tested on; galleries are official where the set has its file.

    name: of the data set of all sides, where it is stated. selection: folder and list of the people
    on whom settings are chosen, like `test_root` and `test_ids`.

    Raises DatasetError for folders that are not as their layout says, AblationError where someone
    is on two sides.
    """
    layout = LAYOUTS[dataset]

    def held_out(root: Path, ids: Path | None) -> list[Sample]:
        return layout.test(root, trial, None if ids is None else layout.read_ids(ids))

    training = training_samples(roots, train_ids, dataset, trial)
    test = held_out(test_root, test_ids)
    chosen = [] if selection is None else held_out(*selection)
    refuse_overlap(
        {"--train-ids": training, "--eval-ids": test, "--select-ids": chosen}, dataset, name
    )
    facts: dict[str, Any] = {"dataset": dataset.value}
    if name_of(dataset, name) != name_of(dataset, None):  # checkpoints know their people by it
        facts["name"] = name
    if layout.trials > 1:
        facts["trial"] = trial
    facts["training"] = sample_facts(training, roots)
    facts["test"] = sample_facts(test, [test_root])
    if selection is not None:
        facts["selection"] = sample_facts(chosen, [selection[0]])
    splits = protocol_splits(dataset, test, trial_file=test_root / TRIAL_FILE)
    return AblationData(dataset, training, test, splits, facts, name, chosen)


def refuse_overlap(
    sides: Mapping[str, Sequence[Sample]], dataset: DatasetName, name: str | None
) -> None:
    """Refuse people who are on two sides.

    sides: the option that lists them → their images.
    Raises AblationError, naming one of them.
    """
    for (one, mine), (other, theirs) in itertools.combinations(sides.items(), 2):
        learnt = [learnt_people(dataset, name_of(dataset, name), mine)]
        both = known_people(learnt, theirs, dataset, name) if mine and theirs else ()
        if both:
            raise AblationError(
                f"identity {min(both)} ({len(both)} in all) is on two sides that must have "
                f"different people; correct {one} or {other}"
            )


def sample_facts(samples: Sequence[Sample], roots: Sequence[Path]) -> dict[str, Any]:
    """Counts, and a digest of which images these are, independent of where the folders are."""
    digest = hashlib.sha256()
    for s in samples:
        line = f"{s.person_id} {s.camera} {s.modality} {s.path.name}\n"
        digest.update(line.encode(errors="surrogateescape"))  # a name need not be text
    return {
        "folders": [root.resolve().name for root in roots],
        "identities": len({sample.person_id for sample in samples}),
        "images": len(samples),
        "digest": digest.hexdigest(),
    }


class CellRunner:
    """Runs the cells of one ablation in one folder, in order, as far as the budget allows."""

    def __init__(
        self,
        data: AblationData,
        folder: Path,
        *,
        device: str = "cpu",
        channels_last: Switch = "auto",
        compile: Switch = "auto",
        budget: Budget | None = None,
        save_every: int = 100,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        """channels_last, compile: as in `RunOptions`; what a timing decides holds for all cells.

        budget: of all calls of `run`; None is no limit.
        save_every: steps between saved states; also how often the minutes are looked at.
        say: told which cell begins, and what each one reaches.
        """
        self.data = data
        self.folder = folder
        self.device = device
        self.channels_last = channels_last
        self.compile = compile
        self.budget = budget or Budget()
        self.save_every = save_every
        self.say = say
        self._origins: dict[Start, _Origin] = {}

    def run(self, cells: Sequence[Cell]) -> list[CellResult]:
        """The results of all cells that are finished now, in the order of `cells`.

        Raises AblationError where a folder holds a cell of other settings or a start does not fit,
        and the errors of training and evaluation.
        """
        results = []
        for number, cell in enumerate(cells, 1):
            result = self._cell(cell, f"[{number}/{len(cells)}] {cell.name}")
            if result is not None:
                results.append(result)
        return results

    def _cell(self, cell: Cell, title: str) -> CellResult | None:
        origin = self._origin(cell.start)
        if origin is None:
            return None
        folder = self.folder / cell.name
        settings = {
            "recipe": cell.recipe.model_dump(mode="json"),
            "seed": cell.seed,
            "start": origin.facts,
            "data": self.data.facts,
        }
        finished = _finished(folder, settings)
        if finished is not None:
            return CellResult.model_validate(finished)
        if self.budget.spent():
            return None
        self.say(title)
        info = self._train(folder, settings, cell.recipe, cell.seed, origin.weights)
        if info is None:
            return None
        result = self._evaluate(cell, folder, settings, info)
        write_json(folder / RESULT_FILE, result.model_dump(mode="json"))
        self.budget.take_cell()
        own = result.first.own
        self.say(
            f"{title}: {result.first.title}, rank-1 {own.mean('rank_1'):.2%}, mAP "
            f"{own.mean('mean_ap'):.2%}"
        )
        return result

    def _origin(self, start: Start) -> _Origin | None:
        """The start, made first if it is to be pre-trained; None where the budget ends before."""
        if start not in self._origins:
            if start.weights is not None:
                weights = InitialWeights(backbone=start.weights)
                found = _Origin(weights, {"weights": Path(start.weights).name})
            elif start.pretraining is not None:
                made = self._pretrain(start.pretraining, start.name)
                if made is None:
                    return None
                found = made
            else:
                assert start.checkpoint is not None
                found = self._checkpoint(start.checkpoint)
            self._origins[start] = found
        return self._origins[start]

    def _checkpoint(self, path: Path) -> _Origin:
        _, info = load_checkpoint(path)
        if info.config.modality_alignment or info.config.instance_alignment:
            raise AblationError(
                f"{path} already has modality or instance alignment trained in, so that the rows "
                "would not start alike; start from a network trained with both off"
            )
        for samples in (self.data.test, self.data.selection):
            refuse_known_people(info, samples, self.data.dataset, self.data.name)
        facts = {"checkpoint": path.name, "fingerprint": info.fingerprint}
        return _Origin(InitialWeights(checkpoint=path), facts)

    def _pretrain(self, recipe: Recipe, name: str) -> _Origin | None:
        bare = switched(recipe, modality_alignment=False, instance_alignment=False)
        folder = self.folder / name
        settings = {
            "recipe": bare.model_dump(mode="json"),
            "seed": 0,
            "data": {
                side: facts
                for side, facts in self.data.facts.items()
                if side not in ("test", "selection")
            },
        }
        finished = _finished(folder, settings)
        if finished is None:
            if self.budget.spent():
                return None
            self.say(f"{name}: the start of every cell")
            info = self._train(folder, settings, bare, 0, RANDOM_WEIGHTS)
            if info is None:
                return None
            finished = {
                "fingerprint": info.fingerprint,
                "steps": info.training["steps"],
                "seconds": info.training["seconds"],
                "settings": settings,
                "machine": machine(),
            }
            write_json(folder / RESULT_FILE, finished)
        facts = {fact: finished[fact] for fact in ("fingerprint", "steps")}
        made = InitialWeights(checkpoint=folder / CHECKPOINT_FILE)
        return _Origin(made, {"pretraining": name} | facts)

    def _train(
        self,
        folder: Path,
        settings: dict[str, Any],
        recipe: Recipe,
        seed: int,
        weights: InitialWeights,
    ) -> CheckpointInfo | None:
        """Train to the end; None where time is up before, with all that was done saved."""
        samples = self.data.training
        trial = self.data.facts.get("trial", 1)
        facts = facts_of(self.data.dataset, trial, samples, self.data.name)
        trainer = Trainer(
            recipe,
            TrainingData(samples, facts=facts),
            RunOptions(
                folder,
                seed=seed,
                device=self.device,
                cache=self.folder / "cache",
                channels_last=self.channels_last,
                compile=self.compile,
                decisions=self.folder,
            ),
            weights,
        )
        write_json(folder / SETTINGS_FILE, settings)  # only now: what cannot begin claims nothing
        if self.budget.minutes is None:
            return trainer.run(save_every=self.save_every)
        reached = 0
        while not self.budget.out_of_time():
            info = trainer.run(save_every=self.save_every, stop_at=reached + self.save_every)
            reached = info.training["step"]
            if reached >= info.training["steps"]:
                return info
        return None

    def _evaluate(
        self, cell: Cell, folder: Path, settings: dict[str, Any], trained: CheckpointInfo
    ) -> CellResult:
        model, info = load_checkpoint(folder / CHECKPOINT_FILE, self.device)
        scores = score_model(model, self.data.test, self.data.splits)
        evaluation = summarise(self.data.dataset, [scores])
        searches = [
            SearchResult.of(*of_search)
            for of_search in zip(scores.splits, evaluation.splits, strict=True)
        ]
        strength = None
        if model.config.instance_alignment:
            strength = self._strength(model)
            embedded = embed_samples(model, self.data.test)
            searches = [
                with_controls(model, embedded, *of_search, strength)
                for of_search in zip(self.data.splits, searches, strict=True)
            ]
        return CellResult(
            name=cell.name,
            row=cell.row,
            seed=cell.seed,
            fingerprint=info.fingerprint,
            steps=trained.training["steps"],
            seconds=trained.training["seconds"],
            settings=settings,
            machine=machine(),
            searches=searches,
            compensation=evaluation.compensation,
            strength=strength,
        )

    def _strength(self, model: CMT) -> ChosenStrength | None:
        """Chosen on the protocol's first search of the selection; None where there is none."""
        if not self.data.selection:
            return None
        search = protocol_splits(self.data.dataset, self.data.selection)[0]
        return choose_strength(model, embed_samples(model, self.data.selection), search)


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a cell's folder, None where there is none yet.

    Raises AblationError where the folder is a cell of other settings.
    """
    stated, result = _read(folder / SETTINGS_FILE), _read(folder / RESULT_FILE)
    if stated is not None:
        stated["recipe"] = with_later_fields(stated.get("recipe"))
    if stated is not None and stated != settings:
        raise AblationError(
            f"{folder} holds a cell of another recipe, start or data; use the same ones as before, "
            "or choose another --run folder"
        )
    return result


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AblationError(
            f"{path} is damaged ({error}); remove its folder, and the cell is made again"
        ) from error
    return content
