"""`cmt train`: a recipe and a data set → a run folder with a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from model import CheckpointInfo
from model.device import DeviceError
from model.outputs import folder_option
from model.precision import PrecisionName
from model.terminal import say, say_lines
from training import distributed
from training.datasets import DatasetError, DatasetName
from training.image_cache import CacheError, Unreadable
from training.malloc import keep_large_blocks
from training.options import ChannelsLast, Compile, DatasetLabel, Device
from training.recipe import RecipeError, recipe_yaml
from training.run import (
    HoldOut,
    PreparedRun,
    RunInterrupted,
    TrainingRequest,
    TrainingSource,
    train_run,
)
from training.sampler import TrainingSetError
from training.state import TrainingError
from training.trainer import CHECKPOINT_FILE, RunOptions
from training.validation import Selection
from training.warm_start import InitialWeights, StartError

# Under several processes all of them meet these, and one sentence is enough.
EXPECTED_ERRORS = (
    CacheError,
    DatasetError,
    DeviceError,
    RecipeError,
    StartError,
    TrainingError,
    TrainingSetError,
)


def train(
    root: Annotated[
        list[Path],
        typer.Option(help="Folder of the dataset; repeat for several with other people."),
    ],
    run: Annotated[
        Path,
        typer.Option(
            help="Folder of the run: state, metrics and checkpoint.", callback=folder_option
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="'paper', 'paper-regdb', 'compact' or another that ships, or the path of a YAML "
            "file. Default: the paper's for the dataset."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a value of the recipe, repeatable: --set margin=0.5 --set "
            "model.gem_p=10 --set stages.0.lr=1e-4",
        ),
    ] = None,
    train_ids: Annotated[
        list[Path] | None,
        typer.Option(
            help="Identity list(s), one comma-separated line each. Default: the training side "
            "of every root, as its protocol says."
        ),
    ] = None,
    dataset: Annotated[DatasetName, typer.Option(help="Layout of the roots.")] = DatasetName.SYSU,
    dataset_name: DatasetLabel = None,
    trial: Annotated[
        int, typer.Option(help="RegDB: which of the ten splits, each a run of its own.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and augmentation.")] = 0,
    device: Device = "auto",
    weights: Annotated[
        str | None,
        typer.Option(help="Start of the backbone: 'imagenet', or a local file of its weights."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="A checkpoint whose weights the whole network starts from."),
    ] = None,
    selection: Annotated[
        Selection,
        typer.Option(
            help="last: train on everyone, keep the last weights, as the paper. val: hold some "
            "identities out, keep the weights of the best mAP on them."
        ),
    ] = "last",
    validate_every: Annotated[
        str | None,
        typer.Option(
            help="'2000' steps or '5 epochs' between validations on held-out identities. "
            "Default: 5 epochs if any are held out."
        ),
    ] = None,
    validation_share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.5,
            help="Share of the training identities to hold out. Default: 0.1 under val.",
        ),
    ] = None,
    validation_ids: Annotated[
        Path | None,
        typer.Option(help="List of identities in the roots to hold out instead of a share."),
    ] = None,
    unreadable: Annotated[
        Unreadable,
        typer.Option(help="What to do about images that cannot be decoded; they are named."),
    ] = "stop",
    precision: Annotated[
        PrecisionName | None,
        typer.Option(help="In place of the recipe's; auto takes the faster one."),
    ] = None,
    channels_last: ChannelsLast = "auto",
    compile: Compile = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder of decoded images. Default: inside the run.", callback=folder_option
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 250,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between progress lines.")] = 50,
) -> None:
    """Train a checkpoint; interrupt it at any moment and go on with --resume.

    Example: cmt train --root SYSU-MM01 --recipe paper --weights resnet50.pth --run runs/paper

    On several GPUs: torchrun --nproc-per-node 4 --no-python -- cmt train …
    """
    keep_large_blocks()
    request = TrainingRequest(
        TrainingSource(dataset, root, train_ids, trial, unreadable, dataset_name),
        RunOptions(run, seed, device, cache, channels_last, compile),
        HoldOut(selection, validate_every, validation_share, validation_ids),
        InitialWeights(weights, start),
        recipe,
        [*(changes or ()), *([f"precision={precision}"] if precision else [])],
        resume=resume,
        save_every=save_every,
        log_every=log_every,
    )
    try:
        train_run(request, begin=_introduce, end=partial(_conclude, run / CHECKPOINT_FILE))
    except RunInterrupted as interrupted:
        if distributed.is_first():
            say(_after_interruption(interrupted, save_every), err=True)
        raise typer.Exit(130) from None
    except EXPECTED_ERRORS:
        if distributed.is_first():
            raise
        raise typer.Exit(1) from None


def _introduce(prepared: PreparedRun) -> None:
    """All that decides the run, before its first step."""
    trainer, notes = prepared
    say_lines(recipe_yaml(trainer.recipe).rstrip())
    for sentence in notes:
        say(sentence, err=True)
    held_out = trainer.validation.identities if trainer.validation else []
    say(
        f"{trainer.sampler.classes} identities, {len(trainer.data.samples)} images, "
        f"{trainer.steps} steps ({trainer.schedule.epoch} an epoch), seed {trainer.options.seed}"
    )
    if held_out:
        say(
            f"{len(held_out)} more identities are held out for validation; the checkpoint will be "
            f"the {'best on them' if trainer.data.selection == 'val' else 'last'}"
        )
    if trainer.step:
        say(f"Goes on from step {trainer.step}")
    processes = distributed.count()
    reasons = trainer.acceleration.reasons
    say(
        f"{reasons['device']}{f' × {processes}' if processes > 1 else ''}: "
        f"{reasons['precision']}; {reasons['memory_format']}"
    )


def _after_interruption(interrupted: RunInterrupted, save_every: int) -> str:
    """What is kept of the run, and how to go on."""
    if interrupted.saved is None:
        return (
            f"Interrupted after step {interrupted.step}, before the first state was saved "
            f"(--save-every {save_every}): the same command begins anew. Decoded images are kept."
        )
    return (
        f"Interrupted after step {interrupted.step}; the same command with --resume goes on from "
        f"step {interrupted.saved}, the last that was saved."
    )


def _conclude(path: Path, info: CheckpointInfo) -> None:
    """What was written, and a warning where modulation is dead."""
    facts = info.training
    step = f" of step {facts['step']}" if facts["selection"] == "val" else ""
    say(f"Wrote {path}{step}, fingerprint {info.fingerprint[:16]}")
    verdict = facts.get("modulation")
    if verdict is not None and verdict["collapsed"]:
        say(
            f"Warning: modulation collapsed. L_mod is {verdict['loss']:.3g}, and "
            f"{verdict['loss_at_equal_distances']:.3g} where all distances are equal; γ is "
            f"{verdict['gamma_mean']:.3g} on average. Do not call this a good run: train for "
            "longer, or try another modulation_form, normalise_test or modulation weight.",
            err=True,
        )
