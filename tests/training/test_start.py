"""Starting a run from another checkpoint: what is taken over, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import CMT, CMTConfig, save_checkpoint
from training.start import StartError, start_from


def saved(config: CMTConfig, path: Path) -> CMT:
    torch.manual_seed(1)
    model = CMT(config)
    save_checkpoint(path, model)
    return model


def test_every_module_that_both_have_is_taken_over(tiny_config, tmp_path):
    given = saved(tiny_config, tmp_path / "start.safetensors").state_dict()
    torch.manual_seed(2)
    model = CMT(tiny_config)
    start_from(model, tmp_path / "start.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, given[name]), name


def test_an_identity_only_network_starts_one_with_both_modules(tiny_config, tmp_path):
    off = {"modality_alignment": False, "instance_alignment": False}
    saved(tiny_config.model_copy(update=off), tmp_path / "start.safetensors")
    torch.manual_seed(2)
    model = CMT(tiny_config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_from(model, tmp_path / "start.safetensors")
    after = model.state_dict()
    assert not torch.equal(after["parts.weight"], before["parts.weight"])
    for name in before:
        if name.startswith(("alignment.", "generator_")):
            assert torch.equal(after[name], before[name]), name


def test_another_input_size_is_no_obstacle(tiny_config, tmp_path):
    saved(tiny_config, tmp_path / "start.safetensors")
    start_from(
        CMT(tiny_config.model_copy(update={"input_height": 192})), tmp_path / "start.safetensors"
    )


@pytest.mark.parametrize("change", [{"dim": 32}, {"width": 0.25}, {"backbone": "resnet34"}])
def test_another_backbone_or_size_is_refused(tiny_config, tmp_path, change):
    saved(tiny_config, tmp_path / "start.safetensors")
    with pytest.raises(StartError, match="start from a checkpoint of the same backbone"):
        start_from(CMT(tiny_config.model_copy(update=change)), tmp_path / "start.safetensors")
