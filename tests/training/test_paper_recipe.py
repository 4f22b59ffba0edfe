"""The recipes that start from ImageNet weights.

One step of the paper's on a small batch: ResNet-50, 384×144, all losses, fp32. `cmt bench train
--recipe paper` runs it with the paper's 128 images.
"""

from __future__ import annotations

from pathlib import Path

import torch

from model import torchvision_compat
from tests.paths import MINI
from training.recipe import load_recipe
from training.run_log import read_metrics
from training.samples import TrainingData, training_samples
from training.trainer import RunOptions, Trainer
from training.warm_start import InitialWeights

FEWER = ["identities=2", "images=2"]  # images in a batch than the paper's 128; all else is as it is


def test_one_step_of_the_papers_recipe_from_a_local_file_of_imagenet_weights(
    tmp_path: Path,
) -> None:
    torchvision_compat.prepare()
    from torchvision.models import resnet50

    torch.manual_seed(7)
    weights = resnet50().state_dict()
    torch.save(weights, tmp_path / "resnet50.pth")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        trainer = Trainer(
            load_recipe("paper", ["precision=float32", *FEWER]),
            TrainingData(training_samples([MINI], [MINI / "exp" / "available_id.txt"])),
            RunOptions(tmp_path / "run", channels_last="off"),
            InitialWeights(backbone=tmp_path / "resnet50.pth"),
        )
        for stem in ("stems.rgb", "stems.ir"):
            own = trainer.model.backbone.get_parameter(f"{stem}.conv1.weight")
            assert torch.equal(own, weights["conv1.weight"])
        assert trainer.share.total == 8
        assert load_recipe("paper").identities * load_recipe("paper").images * 2 == 128
        before = {n: p.detach().clone() for n, p in trainer.objective.named_parameters()}
        values = trainer.train_step()
    finally:
        torch.set_num_threads(threads)
    assert {"identity", "triplet", "consistency", "modulation"} <= values.keys()
    assert all(value.isfinite() for value in values.values())
    assert values["gamma_mean"] == 1  # modulation starts as the identity
    assert trainer.optimiser.param_groups[0]["lr"] == 3.5e-4
    still = {n for n, p in trainer.objective.named_parameters() if torch.equal(p, before[n])}
    # Behind a last layer of zeros, the first layers of the generators wait for their gradient.
    assert still <= {n for n in before if ".generator_" in n and ".inner." in n}


def test_the_strong_recipe_costs_what_the_papers_does() -> None:
    paper, strong = load_recipe("paper"), load_recipe("strong")
    assert strong.model == paper.model.model_copy(update={"normalise_test": True})
    assert strong.identities * strong.images == paper.identities * paper.images
    epochs = [sum(stage.epochs or 0 for stage in recipe.stages) for recipe in (paper, strong)]
    assert epochs == [120, 120]
    assert {strong.size(stage) for stage in strong.stages} == {(384, 144)}


def test_the_strong_recipe_fades_in_what_reads_f_and_ends_with_every_loss(tmp_path: Path) -> None:
    small = ["model.width=0.125", "model.dim=16", "model.heads=4", "precision=float32"]
    small += ["model.input_height=96", "model.input_width=32", "identities=4", "images=1"]
    for stage, steps in enumerate((2, 4)):
        small += [f"stages.{stage}.epochs=null", f"stages.{stage}.steps={steps}"]
    recipe = load_recipe("strong", [*small, "stages.1.fade_steps=1"])
    data = TrainingData(training_samples([MINI], [MINI / "exp" / "train_id.txt"]))
    options = RunOptions(tmp_path, channels_last="off", compile="off")
    Trainer(recipe, data, options).run(log_every=1)
    first, *_, last = read_metrics(tmp_path)
    assert "modulation" not in first
    assert {"identity", "identity_features", "triplet", "consistency", "modulation"} <= last.keys()
    assert last["gamma_std"] > 0  # γ has begun to depend on the query
