"""One step of the paper's recipe on a small batch: ResNet-50, 384×144, all losses, fp32.

`cmt bench train --recipe paper` runs it with the paper's 128 images.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.paths import MINI
from training.recipe import load_recipe
from training.samples import TrainingData, training_samples
from training.trainer import RunOptions, Trainer
from training.warm_start import InitialWeights

FEWER = ["identities=2", "images=2"]  # images in a batch than the paper's 128; all else is as it is


def test_one_step_of_the_papers_recipe_from_a_local_file_of_imagenet_weights(
    tmp_path: Path,
) -> None:
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
