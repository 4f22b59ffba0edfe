"""Starting a run from another checkpoint: what is taken over, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import CMT, CMTConfig, save_checkpoint
from model.alignment import MultiHeadAttention
from training.warm_start import StartError, start_from


def saved(config: CMTConfig, path: Path) -> CMT:
    torch.manual_seed(1)
    model = CMT(config)
    save_checkpoint(path, model)
    return model


def test_every_module_that_both_have_is_taken_over(tiny_config: CMTConfig, tmp_path: Path) -> None:
    given = saved(tiny_config, tmp_path / "start.safetensors").state_dict()
    torch.manual_seed(2)
    model = CMT(tiny_config)
    start_from(model, tmp_path / "start.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, given[name]), name


def test_a_network_with_both_modules_starts_as_the_identity_only_one(
    tiny_config: CMTConfig, tmp_path: Path
) -> None:
    off = {"modality_alignment": False, "instance_alignment": False}
    start = saved(tiny_config.model_copy(update=off), tmp_path / "start.safetensors").eval()
    torch.manual_seed(2)
    model = CMT(tiny_config).eval()
    start_from(model, tmp_path / "start.safetensors")
    images = torch.randn(3, 3, tiny_config.input_height, tiny_config.input_width)
    with torch.no_grad():
        given, own = start(images, "ir"), model(images, "ir")
        gamma, beta = model.modulation(own.embedding)
    assert torch.equal(own.embedding, given.embedding)
    assert own.compensated is not None
    assert not own.compensated.any()
    assert torch.equal(gamma, torch.ones_like(gamma))
    assert not beta.any()


def test_compensation_that_starts_at_zero_is_trained_away_from_it(tiny_config: CMTConfig) -> None:
    torch.manual_seed(2)
    model = CMT(tiny_config)
    assert model.alignment is not None
    model.alignment.decoder.start_at_zero()
    images = torch.randn(4, 3, tiny_config.input_height, tiny_config.input_width)
    output = model(images, "rgb")
    torch.autograd.backward((output.compensated - 1).square().sum())
    last = model.alignment.decoder.cross_attention[-1]
    assert isinstance(last, MultiHeadAttention)
    assert last.output.weight.grad is not None
    assert last.output.weight.grad.abs().sum() > 0


def test_another_input_size_is_no_obstacle(tiny_config: CMTConfig, tmp_path: Path) -> None:
    given = saved(tiny_config, tmp_path / "start.safetensors").state_dict()
    torch.manual_seed(2)
    model = CMT(tiny_config.model_copy(update={"input_height": 192}))
    start_from(model, tmp_path / "start.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, given[name]), name


@pytest.mark.parametrize("change", [{"dim": 32}, {"width": 0.25}, {"backbone": "resnet34"}])
def test_another_backbone_or_size_is_refused(
    tiny_config: CMTConfig, tmp_path: Path, change: dict[str, object]
) -> None:
    saved(tiny_config, tmp_path / "start.safetensors")
    with pytest.raises(StartError, match="start from a checkpoint of the same backbone"):
        start_from(CMT(tiny_config.model_copy(update=change)), tmp_path / "start.safetensors")
