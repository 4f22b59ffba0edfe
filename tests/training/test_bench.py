"""`cmt bench train` runs the trainer's step and both networks, and says on which machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.cli import main
from tests.paths import MINI
from training.bench import made_up_samples, only_last_stage
from training.recipe import load_recipe

RECIPE = """
model: {backbone: resnet18, width: 0.125, dim: 16, heads: 4, input_height: 96, input_width: 32}
identities: 3
images: 2
precision: float32
stages:
  - {steps: 5, lr: 1.0e-3, identities: 2}
  - {epochs: 2, lr: 1.0e-3, fade_steps: 7, warmup_steps: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize("root", [None, MINI])
def test_every_side_is_timed_and_written(
    root: Path | None, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "train.json"
    options = ["--recipe", recipe, "--steps", "2", "--rounds", "2", "--device", "cpu"]
    if root is not None:
        options += ["--root", root]
    assert main(["bench", "train", *map(str, options), "--json", str(out)]) == 0
    assert "bare ResNet" in capsys.readouterr().out
    written = json.loads(out.read_text())
    step, bare, whole = written["results"]
    assert step["side"] == "training step"
    assert whole["side"].startswith("whole network")
    for result in (step, bare, whole):
        rate = result["images per second"]
        assert 0 < rate["least"] <= rate["median"] <= rate["most"]
        assert (result["batch"], result["size"]) == (12, "96×32")
    assert set(bare["share of the bare ResNet's rate"].values()) == {1.0}
    assert written["command"].startswith(f"cmt bench train --recipe {recipe}")
    assert (f"--root {root}" in written["command"]) == (root is not None)
    assert written["machine"]["packages"]["torch"]


def test_the_last_stage_is_measured_on_people_with_both_kinds_of_images(
    recipe: Path, tmp_path: Path
) -> None:
    chosen = only_last_stage(load_recipe(str(recipe)))
    (stage,) = chosen.stages
    assert stage.identities is None
    assert stage.warmup_steps == 1
    samples = made_up_samples(chosen, tmp_path / "pictures")
    assert len(samples) == 2 * 3 * 2 * 2
    assert len({(sample.person_id, sample.modality) for sample in samples}) == 2 * 3 * 2
