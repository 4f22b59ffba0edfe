"""Held-out identities: who they are, what is kept of them, and that a resumed run agrees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from model import CMTConfig, load_checkpoint
from model.cli import main
from tests.paths import MINI
from training.datasets import DatasetError, DatasetName, Sample
from training.recipe import Recipe, Stage
from training.run_log import read_metrics
from training.samples import TrainingData, held_out_samples, training_samples
from training.state import TrainingError
from training.trainer import CHECKPOINT_FILE, RunOptions, Trainer
from training.validation import Interval, Validation, drawn_identities, without

RECIPE = Recipe(
    model=CMTConfig(
        backbone="resnet18",
        width=0.125,
        dim=16,
        heads=4,
        input_height=96,
        input_width=32,
        normalise_test=True,
    ),
    stages=(Stage(steps=6, lr=3e-3),),
    identities=3,
    images=2,
    ema=0.5,
    precision="float32",
)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return training_samples([MINI], None)


@pytest.fixture(scope="module")
def trainer(
    samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trainer]:
    """Folder name → a trainer that validates every two steps and keeps the best."""
    base = tmp_path_factory.mktemp("runs")
    held_out = held_out_samples(samples, [MINI], DatasetName.SYSU, 1, share=0.25)
    validation = Validation(DatasetName.SYSU, held_out, Interval.parse("2"))
    rest = without(samples, validation.identities)

    def make(name: str) -> Trainer:
        facts = {"identities": sorted({s.person_id for s in rest})}
        data = TrainingData(rest, validation, "val", facts)
        return Trainer(RECIPE, data, RunOptions(base / name, cache=base / "cache"))

    return make


def test_the_best_weights_on_held_out_people_become_the_checkpoint(
    trainer: Callable[[str], Trainer],
) -> None:
    run = trainer("whole")
    info = run.run(log_every=3)
    found = [r for r in read_metrics(run.folder) if "validation_map" in r]
    assert [r["step"] for r in found] == [2, 4, 6]
    best = max(found, key=lambda r: r["validation_map"])
    facts = info.training
    assert facts["selection"] == "val"
    assert facts["step"] == facts["validation"]["step"] == best["step"]
    assert facts["validation"]["map"] == best["validation_map"]
    assert run.validation is not None
    assert facts["held_out"] == run.validation.identities
    assert not set(facts["held_out"]) & set(facts["identities"])
    # The file holds the weights that those figures are of (in fp16).
    model = load_checkpoint(run.folder / CHECKPOINT_FILE)[0]
    assert run.validation.figures(model)["map"] == pytest.approx(best["validation_map"], abs=0.02)


def test_an_interrupted_run_keeps_the_same_best(trainer: Callable[[str], Trainer]) -> None:
    for stop in (3, 5, 6):
        pieces = trainer("pieces")
        pieces.run(stop_at=stop, save_every=100)
    whole = trainer("whole")
    whole.run()  # over already, unless this test runs alone
    one, other = (load_checkpoint(t.folder / CHECKPOINT_FILE) for t in (whole, pieces))
    assert one[1].training["validation"] == other[1].training["validation"]
    for name, tensor in one[0].state_dict().items():
        assert torch.equal(tensor, other[0].state_dict()[name]), name


def test_who_is_held_out(samples: list[Sample], tmp_path: Path) -> None:
    people = {s.person_id for s in samples}
    drawn = drawn_identities(samples, 0.3)
    assert drawn < people
    assert len(drawn) == max(2, round(0.3 * len(people)))
    assert drawn == drawn_identities(samples[::-1], 0.3)
    with pytest.raises(DatasetError, match="too few to hold"):
        drawn_identities(without(samples, drawn), 0.9)
    listed = held_out_samples(samples, [MINI], DatasetName.SYSU, 1, ids=MINI / "exp" / "val_id.txt")
    # The set has no test list, so that the people of val_id are trained on only if listed.
    assert {s.person_id for s in listed} == {12, 218, 370}
    assert held_out_samples(samples, [MINI], DatasetName.SYSU, 1) == []


def test_people_of_the_test_side_are_never_validated_on(regdb_root: Path, tmp_path: Path) -> None:
    from training.datasets import LAYOUTS

    layout = LAYOUTS[DatasetName.REGDB]
    train = layout.train(regdb_root)
    for side, refused in ((layout.train_ids(regdb_root), False), (layout.test_ids(regdb_root), 1)):
        (tmp_path / "ids.txt").write_text(str(min(side)))
        arguments = (train, [regdb_root], DatasetName.REGDB, 1)
        if refused:
            with pytest.raises(DatasetError, match="whom the protocol tests on"):
                held_out_samples(*arguments, ids=tmp_path / "ids.txt")
        else:
            found = held_out_samples(*arguments, ids=tmp_path / "ids.txt")
            assert {s.person_id for s in found} == {min(side)}


def test_intervals_are_steps_or_epochs() -> None:
    assert Interval.parse("500").steps(epoch=7) == Interval.parse("500 steps").steps(7) == 500
    assert Interval.parse("3 epochs").steps(7) == Interval.parse("3epochs").steps(7) == 21
    for text in ("0", "often", "-3", "3 weeks", ""):
        with pytest.raises(ValueError, match="is no interval"):
            Interval.parse(text)


def test_selection_by_validation_needs_held_out_people(
    samples: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="needs held-out identities"):
        Trainer(RECIPE, TrainingData(samples, selection="val"), RunOptions(tmp_path))


def test_the_command_holds_people_out_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(RECIPE.model_dump(mode="json")))
    arguments = ["train", "--root", str(MINI), "--recipe", str(tmp_path / "small.yaml")]
    arguments += ["--set", "stages.0.steps=2", "--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*arguments, "--validate-every", "1"]) == 1
    assert "--validate-every needs held-out identities" in capsys.readouterr().err
    listed = ["--validation-ids", str(MINI / "exp" / "val_id.txt"), "--selection", "val"]
    assert main([*arguments, *listed, "--validate-every", "1 epoch"]) == 0
    assert "more identities are held out for validation" in capsys.readouterr().out
    info = load_checkpoint(tmp_path / "run" / CHECKPOINT_FILE)[1]
    assert info.training["held_out"]
    assert main([*arguments, "--resume"]) == 1
    assert "selection val, here last" in capsys.readouterr().err
