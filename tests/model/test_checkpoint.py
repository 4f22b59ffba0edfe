"""Checkpoints come back as they were, or are refused with a sentence."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import CMT, CheckpointError, CMTConfig, load_checkpoint, save_checkpoint
from model.checkpoint import _digest as digest
from model.checkpoint import _fingerprint as fingerprint

CONVOLUTION = "backbone.layer2.0.conv1.weight"


@pytest.fixture
def images(tiny_config: CMTConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, tiny_config.input_height, tiny_config.input_width, generator=generator)


def rewrite(path: Path, **changes: str) -> Path:
    """The same checkpoint with some of its metadata changed."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    other = path.with_name("rewritten.safetensors")
    save_file(load_file(path), other, metadata=metadata)
    return other


def test_save_and_load_give_identical_outputs(
    tiny_model: CMT, images: torch.Tensor, tmp_path: Path
) -> None:
    saved = save_checkpoint(tmp_path / "a.safetensors", tiny_model, training={"seed": 3})
    model, info = load_checkpoint(tmp_path / "a.safetensors")
    assert info == saved
    assert (info.training, info.calibration) == ({"seed": 3}, None)
    before, after = tiny_model.embed(images, "ir"), model.embed(images, "ir")
    assert torch.equal(before, after)
    for a, b in zip(tiny_model.modulation(before), model.modulation(after), strict=True):
        assert torch.equal(a, b)


def test_half_precision_halves_the_file_and_keeps_vectors_whole(
    tiny_model: CMT, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "full.safetensors", tiny_model)
    save_checkpoint(tmp_path / "half.safetensors", tiny_model, dtype=torch.float16)
    tensors = load_file(tmp_path / "half.safetensors")
    assert tensors["backbone.layer4.0.conv1.weight"].dtype == torch.float16
    assert tensors["backbone.layer4.0.bn1.running_var"].dtype == torch.float32
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    assert not list(tmp_path.glob(".*"))


def test_the_fingerprint_follows_weights_and_configuration(
    tiny_config: CMTConfig, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = CMT(tiny_config)
    first = save_checkpoint(tmp_path / "a.safetensors", model).fingerprint
    assert save_checkpoint(tmp_path / "b.safetensors", model).fingerprint == first
    other = CMT(tiny_config.model_copy(update={"metric": "cosine"}))
    other.load_state_dict(model.state_dict())
    assert save_checkpoint(tmp_path / "c.safetensors", other).fingerprint != first
    with torch.no_grad():
        model.get_parameter(CONVOLUTION)[0, 0, 0, 0] += 0.01
    assert save_checkpoint(tmp_path / "d.safetensors", model).fingerprint != first


def test_the_mirror_image_changes_the_fingerprint_and_no_older_one(
    tiny_config: CMTConfig, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model, info = load_checkpoint(tiny_checkpoint)
    tensors = load_file(tiny_checkpoint)
    facts = tiny_config.model_dump()
    del facts["mirror"]  # as a release wrote it that knew no mirror image
    expected = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        expected.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        expected.update(tensors[name].numpy().tobytes())
    assert info.fingerprint == expected.hexdigest()
    mirrored = CMT(tiny_config.model_copy(update={"mirror": True}))
    mirrored.load_state_dict(model.state_dict())
    saved = save_checkpoint(tmp_path / "mirrored.safetensors", mirrored)
    assert saved.fingerprint != info.fingerprint
    assert load_checkpoint(tmp_path / "mirrored.safetensors")[0].config.mirror


def refusal(path: Path) -> str | None:
    """Why the checkpoint is refused, None where it is not."""
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return None


def test_a_damaged_byte_anywhere_is_noticed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = bytearray(tiny_checkpoint.read_bytes())
    generator = torch.Generator().manual_seed(2)
    for position in torch.randint(len(data), (20,), generator=generator).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        (tmp_path / "x.safetensors").write_bytes(damaged)
        message = refusal(tmp_path / "x.safetensors")
        if message is not None:
            assert "\n" not in message
        else:  # only the free-text training facts are not under the fingerprint
            text = bytes(data[max(0, position - 4000) : position + 4000])
            assert b'"training"' in text


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(tiny_checkpoint: Path, tmp_path: Path, share: float) -> None:
    data = tiny_checkpoint.read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        load_checkpoint(tmp_path / "x.safetensors")


def test_other_files_and_versions_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="version 2, this release reads 1"):
        load_checkpoint(rewrite(tiny_checkpoint, version="2"))
    with pytest.raises(CheckpointError, match="no CMT checkpoint"):
        load_checkpoint(rewrite(tiny_checkpoint, format="other"))
    with pytest.raises(CheckpointError, match="unreadable metadata"):
        load_checkpoint(rewrite(tiny_checkpoint, config="{"))
    with safe_open(tiny_checkpoint, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    with pytest.raises(CheckpointError, match="does not match its fingerprint"):
        load_checkpoint(rewrite(tiny_checkpoint, config=json.dumps({**config, "gem_p": 4.0})))


def test_a_pickle_renamed_is_not_executed(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "x.safetensors")
    assert not (tmp_path / "executed").exists()


def test_weights_that_are_not_finite_are_not_written(
    tiny_config: CMTConfig, tmp_path: Path
) -> None:
    model = CMT(tiny_config)
    with torch.no_grad():
        model.get_parameter(CONVOLUTION)[0, 0, 0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float16"):
        save_checkpoint(tmp_path / "x.safetensors", model, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


DEEP = 100_000


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ("[" * DEEP + "]" * DEEP, "recursion limit"),
        ('{"note": ' * DEEP + "1" + "}" * DEEP, "recursion limit"),
        ('{"identities": [1], "seed": 0, "identities": []}', "'identities' is there twice"),
        ('{"note": {"a": 1, "a": 2}}', "'a' is there twice"),
        ('{"seconds": NaN}', "expected value"),
        ('{"note": -Infinity}', "invalid number"),
        ('{"note": 1e999}', "1e999 is not finite"),
        ('{"note": ' + "9" * 5000 + "}", "number out of range"),
        ('{"note": "\\ud800"}', "hex escape"),
        ("[1, 2]", "no JSON object"),
        ('"facts"', "no JSON object"),
        ("null", "no JSON object"),
        ("", "EOF"),
        ('{"identities": {"1": 2}}', "identities: "),
        ('{"identities": [1, "2"]}', "identities.1: "),
        ('{"identities": [1.5]}', "identities.0: "),
        ('{"trial": "3"}', "trial: "),
        ('{"dataset": ["sysu"]}', "dataset: "),
        ('{"learnt_from": [{"identities": [1]}]}', "learnt_from.0.dataset: "),
        ('{"x' + "y" * 10_000 + '": 1,}', "trailing comma"),
    ],
)
def test_facts_that_are_no_facts_are_refused_in_one_sentence(
    tiny_checkpoint: Path, facts: str, reason: str
) -> None:
    message = refusal(rewrite(tiny_checkpoint, training=facts))
    assert message is not None
    assert "unreadable metadata" in message
    assert reason in message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    "text", ["[" * DEEP + "]" * DEEP, "1", '{"dim": 1e400}', '{"dim": 1, "dim": 2}', "{}"]
)
def test_other_metadata_that_is_none_is_refused_too(tiny_checkpoint: Path, text: str) -> None:
    with safe_open(tiny_checkpoint, framework="pt") as file:
        own = file.metadata()["fingerprint"]
    files = {
        "config": {"config": text},
        "calibration": {"calibration": text, "calibration_digest": digest(own + text, {})},
        "version": {"version": text * 500 if len(text) < DEEP else text},
    }
    for changes in files.values():
        message = refusal(rewrite(tiny_checkpoint, **changes))
        assert message is not None
        assert "\n" not in message
        assert len(message) < 600


def test_a_configuration_takes_no_memory_that_its_weights_do_not_fill(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with safe_open(tiny_checkpoint, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tiny_checkpoint)
    config = CMTConfig.model_validate_json(metadata["config"])
    huge = config.model_copy(update={"feed_forward": 10**12})  # terabytes
    metadata |= {"config": huge.model_dump_json(), "fingerprint": fingerprint(huge, tensors)}
    save_file(tensors, tmp_path / "huge.safetensors", metadata=metadata)
    message = refusal(tmp_path / "huge.safetensors")
    assert message is not None
    assert "other weights than its configuration needs" in message
