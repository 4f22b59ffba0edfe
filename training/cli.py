"""`cmt train`: a recipe and a data set → a run folder with a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml

from training.datasets import LAYOUTS, DatasetError, DatasetName, Sample
from training.memory import keep_large_blocks
from training.recipe import load_recipe
from training.trainer import CHECKPOINT_FILE, STATE_FILE, Trainer, TrainingError

# Where the paper's settings differ between datasets: GeM's exponent.
DEFAULT_RECIPES = {DatasetName.REGDB: "paper-regdb"}


def train(
    root: Annotated[
        list[Path],
        typer.Option(help="Folder of the dataset; repeat for several with other people."),
    ],
    run: Annotated[Path, typer.Option(help="Folder of the run: state, metrics and checkpoint.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="'paper', 'paper-regdb', 'compact', or the path of a YAML file. Default: the "
            "paper's for the dataset."
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
    trial: Annotated[
        int, typer.Option(help="RegDB: which of the ten splits, each a run of its own.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and augmentation.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    weights: Annotated[
        str | None,
        typer.Option(help="Start of the backbone: 'imagenet', or a local file of its weights."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="A checkpoint whose weights the whole network starts from."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of decoded images. Default: inside the run.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 250,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between progress lines.")] = 50,
) -> None:
    """Train a checkpoint; interrupt it at any moment and go on with --resume.

    Example: cmt train --root SYSU-MM01 --recipe paper --weights resnet50.pth --run runs/paper
    """
    keep_large_blocks()
    if (run / STATE_FILE).is_file() and not resume:
        raise TrainingError(
            f"{run} holds a run already; add --resume to go on with it, or choose another folder"
        )
    chosen = load_recipe(recipe or DEFAULT_RECIPES.get(dataset, "paper"))
    samples = training_samples(root, train_ids, dataset, trial)
    identities = sorted({sample.person_id for sample in samples})
    trainer = Trainer(
        chosen,
        samples,
        run,
        seed=seed,
        device=device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu",
        weights=weights,
        start=start,
        cache=cache,
        facts={
            "dataset": dataset.value,
            "identities": identities,
            "images": len(samples),
            **({"trial": trial} if LAYOUTS[dataset].trials > 1 else {}),
        },
    )
    typer.echo(yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False))
    typer.echo(
        f"{len(identities)} identities, {len(samples)} images, {trainer.steps} steps, seed {seed}, "
        f"{trainer.precision.reason}"
    )
    try:
        info = trainer.run(save_every=save_every, log_every=log_every)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; the same command with --resume goes on from {run}.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"Wrote {run / CHECKPOINT_FILE}, fingerprint {info.fingerprint[:16]}")


def training_samples(
    roots: Sequence[Path],
    train_ids: Sequence[Path] | None,
    dataset: DatasetName = DatasetName.SYSU,
    trial: int = 1,
) -> list[Sample]:
    """The images of the chosen identities of all roots, root by root.

    Raises DatasetError when an identity is in two roots (they would be two people) or in none.
    """
    layout = LAYOUTS[dataset]
    wanted = (
        {person for path in train_ids for person in layout.read_ids(path)} if train_ids else None
    )
    samples: list[Sample] = []
    for root in roots:
        found = layout.train(root, trial, wanted)
        known = {sample.person_id for sample in samples}
        twice = known & {sample.person_id for sample in found}
        if twice:
            raise DatasetError(
                f"identity {min(twice)} is in {root} and in an earlier root; give every person "
                "one number"
            )
        samples += found
    missing = (wanted or set()) - {sample.person_id for sample in samples}
    if missing:
        raise DatasetError(
            f"identity {min(missing)} ({len(missing)} missing in all) is in none of the roots; "
            "correct --train-ids or add its root"
        )
    if not Counter(sample.modality for sample in samples).keys() >= {"rgb", "ir"}:
        raise DatasetError(
            "no visible or no infrared images for the chosen identities in "
            f"{', '.join(map(str, roots))}",
            dataset,
        )
    return samples
