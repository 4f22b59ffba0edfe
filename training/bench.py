"""`cmt bench train`: a training step with everything around it, against the bare backbone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from model import CMT, Modality
from model.backbone import TwoStreamResNet
from model.benchmark import Spread, publish, seconds
from model.benchmark_table import Headline, as_fast, rate
from model.config import MODALITIES
from model.device import chosen_device
from model.outputs import ResultsFile
from training.datasets import LAYOUTS, DatasetName, Sample
from training.malloc import keep_large_blocks
from training.options import Device
from training.recipe import Recipe, Stage, load_recipe
from training.samples import TrainingData, training_samples
from training.trainer import RunOptions, Trainer

QUICK = ("--recipe", "compact", "--steps", "2", "--rounds", "2")
# Made-up people: twice as many as a batch has, so that batches differ.
_PEOPLE_PER_BATCH_PERSON = 2
_BARE = "bare ResNet, forward and backward"


def train(
    recipe: Annotated[
        str, typer.Option(help="'compact', 'paper' or the path of a YAML file; its last stage.")
    ] = "paper",
    root: Annotated[
        Path | None, typer.Option(help="Folder of a dataset; without one, made-up pictures.")
    ] = None,
    dataset: Annotated[DatasetName, typer.Option(help="Layout of the root.")] = DatasetName.SYSU,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each side in a round.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="How often all sides run, in turn.")] = 5,
    device: Device = "auto",
    json: ResultsFile = None,
) -> None:
    """Images a second of the trainer's step, against the two-stream ResNet alone.

    The step reads a batch from the cache of decoded images, augments it, and runs the network, all
    losses, the backward pass and the optimiser. The ResNet runs forward and backward on a resident
    batch of the same size and precision. The whole network's forward and backward pass is timed
    as well, to show where the time goes.

    Example: cmt bench train --recipe compact --json benchmarks/results/train.json
    """
    keep_large_blocks()
    device = chosen_device(device)
    chosen = only_last_stage(load_recipe(recipe))
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            samples = made_up_samples(chosen, Path(folder) / "pictures")
        else:
            samples = training_samples([root], None, dataset)
        trainer = Trainer(
            chosen, TrainingData(samples), RunOptions(Path(folder) / "run", device=device)
        )
        times = step_times(trainer, steps, rounds)
    batch = 2 * chosen.identities * chosen.images
    results = [
        {
            "side": name,
            "images per second": Spread.of([batch * steps / t for t in taken]),
            "share of the bare ResNet's rate": Spread.of(
                [bare / t for bare, t in zip(times[_BARE], taken, strict=True)]
            ),
        }
        for name, taken in times.items()
    ]
    height, width = chosen.size(chosen.stages[0])
    settings = {
        "recipe": recipe,
        **({} if root is None else {"root": str(root), "dataset": dataset.value}),
        **{"steps": steps, "rounds": rounds, "device": device},
    }
    facts = {
        "batch": batch,
        "size": f"{height}×{width}",
        "backbone": chosen.model.backbone,
        "precision": trainer.acceleration.precision_reason,
    }
    rows = [tuple(result.values()) for result in results]
    rows.append((f"batch {batch}, {facts['size']}, {facts['backbone']}", facts["precision"], ""))
    results = [{**result, **facts} for result in results]
    columns = ("", "images/s: median (least–most)", "share of the bare ResNet's")
    publish("train", settings, columns, rows, results, json)


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`."""
    rates = {result["side"]: result["images per second"] for result in report["results"]}
    for result in report["results"]:
        if result["side"] != _BARE:
            yield Headline(
                f"{result['side']}, recipe {report['settings']['recipe']}, "
                f"{result['batch']} images of {result['size']}",
                rate(result["images per second"], "images"),
                _BARE,
                rate(rates[_BARE], "images"),
                as_fast(result["share of the bare ResNet's rate"]),
            )


def step_times(trainer: Trainer, steps: int, rounds: int) -> dict[str, list[float]]:
    """Side → the seconds that `steps` steps of it took in each round; sides take turns."""
    stage = trainer.recipe.stages[0]
    sides = {"training step": trainer.train_step, **_resident_sides(trainer, stage)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()  # warm up: decode, choose kernels, allocate
    for _ in range(rounds):
        for name, call in sides.items():
            times[name].append(seconds(lambda call=call: [call() for _ in range(steps)]))  # type: ignore[misc]
    return times


def only_last_stage(recipe: Recipe) -> Recipe:
    """The recipe with its last stage alone (full size, all losses), longer than any benchmark."""
    last = recipe.stages[-1].model_copy(update={"steps": 10**6, "epochs": None, "fade_steps": 0})
    return recipe.model_copy(update={"stages": (last,)})


def made_up_samples(recipe: Recipe, folder: Path) -> list[Sample]:
    """Pictures of coarse blocks in the `folder` layout, for a user without data.

    Training reads them decoded, from the cache: their content does not change its speed.
    """
    height, width = recipe.size(recipe.stages[0])
    generator = np.random.default_rng(0)
    for person in range(1, 1 + _PEOPLE_PER_BATCH_PERSON * recipe.identities):
        for modality in ("rgb", "ir"):
            place = folder / modality / str(person)
            place.mkdir(parents=True)
            for number in range(recipe.images):
                blocks = generator.integers(0, 256, (12, 5, 3), dtype=np.uint8)
                Image.fromarray(blocks).resize((width, height)).save(place / f"{number}.jpg")
    return LAYOUTS[DatasetName.FOLDER].images(folder)


def _resident_sides(trainer: Trainer, stage: Stage) -> dict[str, Callable[[], object]]:
    """Networks of their own, forward and backward on one batch that lies on the device."""
    recipe, device = trainer.recipe, trainer.device
    precision, layout = trainer.acceleration.precision, trainer.acceleration.memory_format
    count = recipe.identities * recipe.images
    modalities: list[Modality] = [modality for modality in MODALITIES for _ in range(count)]
    is_ir = torch.tensor([modality == "ir" for modality in modalities], device=device)
    images = torch.randn(2 * count, 3, *recipe.size(stage), device=device)
    images = images.contiguous(memory_format=layout)
    bare, whole = TwoStreamResNet(recipe.model).to(device), CMT(recipe.model).to(device)

    def backbone() -> torch.Tensor:
        return bare(images, is_ir)  # type: ignore[no-any-return]

    def network() -> torch.Tensor:
        return whole(images, modalities).complete  # type: ignore[no-any-return]

    def forward_backward(
        module: torch.nn.Module, forward: Callable[[], torch.Tensor]
    ) -> Callable[[], object]:
        module.train().to(memory_format=layout)  # type: ignore[call-overload]

        def run() -> None:
            with torch.autocast(device.type, precision.dtype, enabled=precision.autocast):
                output = forward()
            module.zero_grad(set_to_none=True)
            output.float().mean().backward()  # type: ignore[no-untyped-call]

        return run

    return {
        _BARE: forward_backward(bare, backbone),
        "whole network, forward and backward": forward_backward(whole, network),
    }
