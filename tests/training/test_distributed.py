"""Two processes train as one: the same losses, gradients, weights and statistics, on gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from model import CMTConfig, load_checkpoint
from tests.paths import MINI, ROOT
from training.augmentation import AugmentationConfig
from training.recipe import LossWeights, Recipe, Stage
from training.run_log import read_metrics
from training.samples import TrainingData, training_samples
from training.state import TrainingError
from training.trainer import CHECKPOINT_FILE, RunOptions, Trainer

EVERYTHING = AugmentationConfig(gray=0.5, channel_exchange=0.5, brightness=0.3, contrast=0.3)
WEIGHTS = LossWeights(triplet_parts=0.5, modulation=1)


def make(folder: Path, identities: int = 4) -> Trainer:
    recipe = Recipe(
        model=CMTConfig(
            backbone="resnet18",
            width=0.125,
            dim=16,
            heads=4,
            input_height=96,
            input_width=32,
            normalise_test=True,
        ),
        # The second stage leaves g_γ and g_β without gradients, the third what computes F.
        stages=(
            Stage(steps=2, lr=1e-3, weights=WEIGHTS),
            Stage(steps=1, lr=1e-3, weights=LossWeights(modulation=0)),
            Stage(steps=1, lr=1e-3, features_frozen=True, weights=WEIGHTS),
            Stage(steps=1, lr=1e-3, weights=WEIGHTS),
        ),
        identities=identities,
        images=2,
        ema=0.5,
        modulation_form="softmax",
        augmentation=EVERYTHING,
        precision="float32",
    )
    samples = training_samples([MINI], [MINI / "exp" / "train_id.txt"])
    options = RunOptions(folder / "run", cache=folder / "cache", channels_last="off", compile="off")
    return Trainer(recipe, TrainingData(samples), options)


def one_step(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Values and gradients of the first step, and the statistics of batch norm after it."""
    trainer = make(folder)
    values = trainer.train_step()
    gradients = {
        n: p.grad.clone() for n, p in trainer.objective.named_parameters() if p.grad is not None
    }
    statistics = {n: b.clone().float() for n, b in trainer.model.named_buffers()}
    return {"values": values, "gradients": gradients, "statistics": statistics}


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"  # no port, which somebody else may take first
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.save(one_step(folder), folder / f"{rank}.pt")
    make(folder).run(stop_at=2, log_every=1)
    make(folder).run(log_every=1)  # resumed by both
    with pytest.raises(TrainingError, match="the 3 identities of a batch cannot be shared out"):
        make(folder, identities=3)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a step of each of two processes, and a run by both."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        # The new processes take over sys.path, and import this module by its name from the root.
        patch.syspath_prepend(ROOT)
        spawn(process, (folder,), nprocs=2)  # type: ignore[no-untyped-call]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one")


def test_a_step_of_two_processes_is_the_step_of_one(one: Path, two: Path) -> None:
    alone = one_step(one)
    ranks = [torch.load(two / f"{rank}.pt") for rank in (0, 1)]
    assert {"triplet_parts", "consistency", "modulation"} <= alone["values"].keys()
    assert any(name.startswith("model.generator_gamma") for name in alone["gradients"])
    for kind, expected in alone.items():
        for found in (rank[kind] for rank in ranks):
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                scale = tensor.abs().max().clamp(min=1e-3)
                difference = (found[name] - tensor).abs().max() / scale
                assert difference < 1e-3, (kind, name, difference)
    for name, gradient in ranks[0]["gradients"].items():
        assert torch.equal(gradient, ranks[1]["gradients"][name]), name


def test_a_run_of_two_processes_is_written_once_and_like_that_of_one(one: Path, two: Path) -> None:
    make(one).run(log_every=1)
    records, expected = read_metrics(two / "run"), read_metrics(one / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    for record, alone in zip(records, expected, strict=True):
        assert record["loss"] == pytest.approx(alone["loss"], rel=2e-2)
    info = load_checkpoint(two / "run" / CHECKPOINT_FILE)[1]
    assert info.training["processes"] == 2
    assert info.training["step"] == 5
