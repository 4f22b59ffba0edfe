"""The trainer on a small real folder: it learns, resumes to equality, and refuses in sentences."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model import CMTConfig, load_checkpoint
from model.cli import main
from tests.paths import MINI
from training.acceleration import DECISION_FILE, choose_acceleration
from training.datasets.sample import DatasetError, Sample
from training.recipe import LossWeights, Recipe, RecipeError, Stage, load_recipe
from training.run_log import CURVES_FILE, METRICS_FILE, TENSORBOARD_FOLDER, read_metrics
from training.sampler import TrainingSetError
from training.samples import TrainingData, training_samples
from training.state import STATE_FILE, TrainingError
from training.trainer import CHECKPOINT_FILE, RECIPE_FILE, RunOptions, Trainer

CMT_COMMAND = "from model.cli import main; raise SystemExit(main())"
ALL = LossWeights(triplet_parts=0.5)


def recipe(**changes: object) -> Recipe:
    small = CMTConfig(
        backbone="resnet18",
        width=0.125,
        dim=16,
        heads=4,
        input_height=96,
        input_width=32,
        normalise_test=True,
    )
    stages = (
        Stage(steps=3, lr=3e-3, warmup_steps=2, weights=LossWeights(modulation=0)),
        Stage(steps=5, lr=3e-3, lr_end=1e-3, fade_steps=2, weights=ALL),
    )
    values = {"model": small, "stages": stages, "identities": 4, "images": 2, "ema": 0.5}
    return Recipe.model_validate({**values, "precision": "float32", **changes})


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return training_samples([MINI], [MINI / "exp" / "train_id.txt"])


def options(folder: Path, cache: Path | None = None) -> RunOptions:
    """Without a timing that decides: two runs are equal to the last bit."""
    return RunOptions(folder, cache=cache, channels_last="off")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / CHECKPOINT_FILE)[0].state_dict()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    samples: list[Sample], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    Trainer(recipe(), TrainingData(samples), options(tmp_path / "whole", cache)).run(save_every=100)
    for stop in (2, 5, 8):  # three processes in a row; two of them stop in the middle
        Trainer(recipe(), TrainingData(samples), options(tmp_path / "pieces", cache)).run(
            save_every=100, stop_at=stop
        )
    whole, pieces = weights_of(tmp_path / "whole"), weights_of(tmp_path / "pieces")
    assert whole.keys() == pieces.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, pieces[name]), name


def test_steps_since_the_last_saved_state_are_repeated_alike(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(recipe(), TrainingData(samples), options(tmp_path / "a", tmp_path / "cache"))
    trainer.run(save_every=2, stop_at=4)
    lost = Trainer(recipe(), TrainingData(samples), options(tmp_path / "a", tmp_path / "cache"))
    step = lost.train_step

    def interrupted() -> dict[str, torch.Tensor]:
        if lost.step == 7:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(lost, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lost.run(save_every=100)
    resumed = Trainer(recipe(), TrainingData(samples), options(tmp_path / "a", tmp_path / "cache"))
    assert resumed.step == 4
    resumed.run()
    Trainer(recipe(), TrainingData(samples), options(tmp_path / "b", tmp_path / "cache")).run()
    expected = weights_of(tmp_path / "b")
    for name, tensor in weights_of(tmp_path / "a").items():
        assert torch.equal(tensor, expected[name]), name


def test_what_a_timing_decided_belongs_to_the_run(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faster(gain: float) -> None:
        """The next timing finds channels_last `gain` times as fast."""
        monkeypatch.setattr("training.acceleration._layout_gain", lambda *_: gain)
        choose_acceleration.cache_clear()

    def trainer(folder: str, **changes: Any) -> Trainer:
        chosen = RunOptions(tmp_path / folder, cache=tmp_path / "cache", **changes)
        return Trainer(recipe(), TrainingData(samples), chosen)

    faster(1.5)
    trainer("whole").run(save_every=100)
    trainer("pieces").run(save_every=100, stop_at=3)
    stopped = trainer("early")  # before its first saved state
    monkeypatch.setattr(stopped, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    written = json.loads((tmp_path / "pieces" / DECISION_FILE).read_text())
    assert written["options"] == "--precision float32 --channels-last on --compile off"

    faster(0.5)
    for folder in ("pieces", "early"):
        resumed = trainer(folder)
        assert resumed.acceleration.channels_last
        resumed.run(save_every=100)
    assert not trainer("new").acceleration.channels_last
    assert not trainer("pieces", channels_last="off").acceleration.channels_last
    trainer("stated", channels_last="on", compile="off").run(save_every=100)
    whole = weights_of(tmp_path / "whole")
    for folder in ("pieces", "early", "stated"):
        found = weights_of(tmp_path / folder)
        for name, tensor in whole.items():
            assert torch.equal(tensor, found[name]), (folder, name)
    (tmp_path / "pieces" / DECISION_FILE).write_text('{"options": "", "device": 3}')
    with pytest.raises(TrainingError, match="is damaged; remove it"):
        trainer("pieces")
    choose_acceleration.cache_clear()


def interrupted() -> dict[str, torch.Tensor]:
    raise KeyboardInterrupt


def test_a_stage_may_freeze_what_computes_the_features(
    samples: list[Sample], tmp_path: Path
) -> None:
    stages = tuple(
        Stage(steps=2, lr=3e-3, features_frozen=frozen) for frozen in (False, True, False)
    )
    changing = recipe(stages=stages, ema=0)
    folder, cache = tmp_path / "pieces", tmp_path / "cache"
    seen = []
    for stop in (2, 3, 4, 6):  # a new process within the frozen stage, too
        Trainer(changing, TrainingData(samples), options(folder, cache)).run(stop_at=stop)
        seen.append(weights_of(folder))
    Trainer(changing, TrainingData(samples), options(tmp_path / "whole", cache)).run()
    whole = weights_of(tmp_path / "whole")
    assert all(torch.equal(whole[name], seen[-1][name]) for name in whole)

    def same(first: int, second: int) -> set[bool]:
        pairs = ((tensor, seen[second][name]) for name, tensor in seen[first].items() if of(name))
        return {torch.equal(*pair) for pair in pairs}

    def of(name: str) -> bool:  # batch norm's statistics are among them
        return name.startswith(("backbone.", "parts."))

    assert same(0, 2) == {True}
    assert False in same(2, 3)
    learnt = ("prototypes_rgb", "generator_beta.outer.weight")
    for name in (name for name in whole if name.endswith(learnt)):
        assert not torch.equal(seen[0][name], seen[2][name])


def test_batch_norm_may_keep_the_statistics_of_the_start(
    samples: list[Sample], tmp_path: Path
) -> None:
    for frozen in (True, False):
        trainer = Trainer(
            recipe(frozen_batch_norm=frozen),
            TrainingData(samples),
            RunOptions(tmp_path / str(frozen), cache=tmp_path / "c"),
        )
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        for _ in range(2):
            trainer.train_step()
        after = trainer.model.state_dict()
        statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
        assert len(statistics) > 20
        assert all(torch.equal(before[n], after[n]) == frozen for n in statistics)
        assert not torch.equal(before["parts.norm.weight"], after["parts.norm.weight"])


def test_training_lowers_the_identity_loss_and_says_what_it_did(
    samples: list[Sample], tmp_path: Path
) -> None:
    longer = recipe(stages=(Stage(steps=60, lr=3e-3, weights=ALL),))
    data = TrainingData(samples, facts={"dataset": "sysu", "identities": [7]})
    info = Trainer(longer, data, RunOptions(tmp_path)).run(log_every=1)
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    first, last = (
        sum(line["identity"] for line in part) / 10 for part in (lines[:10], lines[-10:])
    )
    assert last < 0.8 * first
    assert {"triplet", "consistency", "modulation", "gamma_std", "beta_share"} <= lines[-1].keys()
    assert info.training["steps"] == info.training["step"] == 60
    assert info.training["identities"] == [7]
    assert Recipe.model_validate(info.training["recipe"]) == longer


def test_schedule_and_weights_follow_the_stages(samples: list[Sample], tmp_path: Path) -> None:
    trainer = Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path))
    assert [round(trainer.schedule.learning_rate(s), 5) for s in range(3)] == [0.0015, 0.003, 0.003]
    assert trainer.schedule.learning_rate(3) == pytest.approx(3e-3)
    assert 1e-3 < trainer.schedule.learning_rate(7) < 2e-3
    assert [trainer.schedule.loss_weights(s).modulation for s in (2, 3, 4, 5)] == [0, 0, 0.1, 0.2]


def test_the_papers_recipe_is_the_default(samples: list[Sample], tmp_path: Path) -> None:
    paper = load_recipe("paper")
    assert paper == Recipe()
    assert (paper.model.backbone, paper.model.input_height, paper.model.input_width) == (
        "resnet50",
        384,
        144,
    )
    trainer = Trainer(
        paper.model_copy(update={"identities": 2, "images": 1, "precision": "float32"}),
        TrainingData(samples),
        RunOptions(tmp_path, channels_last="off"),  # or two memory orders of ResNet-50 are timed
    )
    epoch = trainer.steps // 120
    assert trainer.steps == 120 * epoch
    rates = [trainer.schedule.learning_rate(e * epoch) for e in (0, 59, 60, 89, 90, 119)]
    assert rates == [3.5e-4, 3.5e-4, 3.5e-5, 3.5e-5, 3.5e-6, 3.5e-6]


def test_a_loss_that_is_not_finite_stops_with_the_step(
    samples: list[Sample], tmp_path: Path
) -> None:
    trainer = Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path))
    trainer.run(stop_at=2, save_every=1)
    with torch.no_grad():
        trainer.objective.heads["complete"].weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite at step 2"):
        trainer.run()
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE)[1].training["step"] == 2


def test_a_run_of_another_recipe_is_not_resumed(samples: list[Sample], tmp_path: Path) -> None:
    Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path)).run(stop_at=1)
    one_stage = recipe(stages=recipe().stages[:1])
    for (changed, given, seed), sentence in [
        ((recipe(), samples, 1), "holds a run with seed 0, here 1; resume with the same"),
        ((recipe(margin=0.5), samples, 0), r"margin 0\.3, here 0\.5"),
        ((one_stage, samples, 0), "2 stages, here 1"),
        ((recipe(), samples[1:], 0), r"training images \d+ \(\w+\), here"),
    ]:
        with pytest.raises(TrainingError, match=sentence):
            Trainer(changed, TrainingData(given), RunOptions(tmp_path, seed=seed))
    (tmp_path / STATE_FILE).write_bytes(b"half a file")
    with pytest.raises(TrainingError, match="no readable state"):
        Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path))


def test_a_run_goes_on_although_recipes_have_got_fields_since(
    samples: list[Sample], tmp_path: Path
) -> None:
    def saved_with(run: dict[str, Any]) -> None:
        """Write the state anew as another release would have described its run."""
        state = torch.load(tmp_path / STATE_FILE, weights_only=True)
        torch.save({**state, "run": json.dumps(run)}, tmp_path / STATE_FILE)

    Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path)).run(stop_at=1)
    run = json.loads(torch.load(tmp_path / STATE_FILE, weights_only=True)["run"])
    del run["modulation_without_generators"], run["stages"][0]["features_frozen"]
    saved_with(run)
    assert Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path)).step == 1
    changed = recipe(modulation_without_generators=True)
    with pytest.raises(TrainingError, match="modulation_without_generators False, here True"):
        Trainer(changed, TrainingData(samples), RunOptions(tmp_path))
    saved_with({**run, "field_of_a_later_release": 1})
    with pytest.raises(TrainingError, match="field_of_a_later_release 1, here None"):
        Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path))


def test_recipes_that_cannot_be_read_say_where(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"use one of .*compact, .*paper, paper-regdb"):
        load_recipe("absent")
    bad = tmp_path / "bad.yaml"
    for text, sentence in [
        ("margin: wide", "margin: Input should be a valid number"),
        ("colour: red", "colour: Extra inputs"),
        ("stages: [{steps: 5, epochs: 5, lr: 1}]", "either steps or epochs"),
        ("stages: [{steps: 5, lr: 1, input_height: 100}]", "not a multiple of 96"),
        ("a: [", "is no YAML"),
        ("model: {input_height: 400}", "which 6 parts do not divide; use a multiple of 96"),
        ("stages: [{steps: 5, lr: 1, weights: {identity: 0, triplet: 0}}]", "needs weight on"),
    ]:
        bad.write_text(text)
        with pytest.raises(RecipeError, match=sentence):
            load_recipe(str(bad))


def test_a_recipe_is_changed_by_dotted_keys() -> None:
    changes = ["margin=0.5", "model.gem_p=10", "stages.0.lr=1e-4", "model.feed_forward=64"]
    changed = load_recipe("paper", changes)
    assert (changed.margin, changed.model.gem_p, changed.stages[0].lr) == (0.5, 10, 1e-4)
    assert changed.stages[1:] == load_recipe("paper").stages[1:]
    assert load_recipe("paper-regdb") == load_recipe("paper", ["model.gem_p=10"])
    # Neither fits without the other, in either order.
    load_recipe("paper", ["model.parts=4", "model.input_height=256"])
    for change, sentence in [
        ("margin", "--set margin has no value"),
        ("margins=1", "--set margins: the recipe has no such key"),
        ("stages.7.lr=1", r"--set stages\.7\.lr: the recipe has no such key"),
        ("margin.x=1", r"--set margin\.x: the recipe has no such key"),
        ("stages.0.lr=fast", r"--set: stages\.0\.lr: Input should be a valid number"),
        ("model.parts=5", "which 5 parts do not divide"),
        ("margin=[", "--set margin is no YAML"),
    ]:
        with pytest.raises(RecipeError, match=sentence):
            load_recipe("paper", [change])


def test_a_run_leaves_curves_tensorboard_files_and_its_recipe(
    samples: list[Sample], tmp_path: Path
) -> None:
    longer = recipe(stages=(Stage(steps=4, lr=3e-3, weights=ALL),))
    Trainer(longer, TrainingData(samples), RunOptions(tmp_path)).run(log_every=1)
    assert (tmp_path / CURVES_FILE).stat().st_size > 10_000
    assert list((tmp_path / TENSORBOARD_FOLDER).iterdir())
    assert load_recipe(str(tmp_path / RECIPE_FILE)) == longer


def test_lines_after_the_resumed_step_are_written_once(
    samples: list[Sample], tmp_path: Path
) -> None:
    trainer = Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path))
    trainer.run(save_every=2, log_every=1, stop_at=4)
    with (tmp_path / METRICS_FILE).open("a") as file:  # a kill after steps 5 and 6
        file.write('{"step": 5, "loss": 7.0}\n{"step": 6, "los')
    Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path)).run(log_every=1)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[4]["loss"] != 7.0


def test_a_full_disk_leaves_the_state_and_checkpoint_saved_before(
    samples: list[Sample], tmp_path: Path
) -> None:
    Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path)).run(stop_at=2)
    kept = {name: (tmp_path / name).read_bytes() for name in (STATE_FILE, CHECKPOINT_FILE)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(TrainingError, match=r"cannot be written .*; free some space and go on"):
            Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path)).run(stop_at=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    assert not list(tmp_path.glob("*.partial"))
    assert Trainer(recipe(), TrainingData(samples), RunOptions(tmp_path)).step == 2


def test_fewer_people_than_a_batch_are_refused(samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(TrainingSetError, match="5 identities are fewer than the 6 of one batch"):
        Trainer(recipe(identities=6), TrainingData(samples), RunOptions(tmp_path))


def test_identities_of_several_roots_are_joined_and_checked(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="in an earlier root"):
        training_samples([MINI, MINI], None)
    (tmp_path / "ids.txt").write_text("99999")
    with pytest.raises(DatasetError, match="identity 99999"):
        training_samples([MINI], [tmp_path / "ids.txt"])
    both = {s.person_id for s in training_samples([MINI], None)}
    only = {s.person_id for s in training_samples([MINI], [MINI / "exp" / "train_id.txt"])}
    assert only == both  # without a list of test people, those of val_id.txt are held back


def test_the_command_trains_refuses_to_overwrite_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe().model_dump(mode="json")))
    arguments = ["train", "--train-ids", str(MINI / "exp" / "train_id.txt")]
    arguments += ["--recipe", str(tmp_path / "small.yaml"), "--run", str(tmp_path / "run")]
    assert main([*arguments, "--root", str(MINI)]) == 0
    said = capsys.readouterr()
    assert "images, 8 steps (" in said.out
    assert "seed 0" in said.out
    assert load_recipe(str(tmp_path / "run" / RECIPE_FILE)) == recipe()
    info = load_checkpoint(tmp_path / "run" / CHECKPOINT_FILE)[1]
    assert info.training["dataset"] == "sysu"
    assert info.training["identities"] == [7, 18, 21, 23, 30]
    assert main([*arguments, "--root", str(MINI)]) == 1
    assert "add --resume" in capsys.readouterr().err
    assert main([*arguments, "--root", str(MINI), "--resume"]) == 0
    assert "modulation collapsed" in capsys.readouterr().err  # after eight steps it has learned 0
    assert main([*arguments, "--root", str(tmp_path / "absent"), "--resume"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1


def test_a_damaged_image_stops_the_command_or_is_skipped_by_a_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(MINI, tmp_path / "set"))
    damaged = next((root / "cam1").rglob("*.jpg"))
    damaged.write_bytes(damaged.read_bytes()[:300])
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe().model_dump(mode="json")))
    arguments = ["train", "--root", str(root), "--recipe", str(tmp_path / "small.yaml")]
    arguments += ["--run", str(tmp_path / "run"), "--device", "cpu"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"{damaged} cannot be decoded" in error
    assert error.count("\n") == 1
    assert main([*arguments, "--unreadable", "skip"]) == 0
    assert str(damaged) in capsys.readouterr().err
    facts = load_checkpoint(tmp_path / "run" / CHECKPOINT_FILE)[1].training
    assert facts["skipped_images"] == 1
    assert facts["images"] == len(training_samples([root], None)) - 1


def test_wrong_weights_are_told_before_anything_is_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--root", str(MINI), "--run", str(tmp_path / "run"), "--device", "cpu"]
    for option, error in (("--weights", "no weights file"), ("--start", "no checkpoint at")):
        assert main(["train", *where, option, str(tmp_path / "absent.pth")]) == 1
        assert error in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_promises_what_was_saved_and_nothing_else(saved: bool, tmp_path: Path) -> None:
    content = recipe(stages=(Stage(steps=100_000, lr=1e-3),)).model_dump(mode="json")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    ids, run = MINI / "exp" / "train_id.txt", tmp_path / "run"
    command = [
        *(sys.executable, "-c", CMT_COMMAND, "train", "--root", str(MINI), "--train-ids", str(ids)),
        *("--recipe", str(tmp_path / "small.yaml"), "--run", str(run), "--device", "cpu"),
        *("--channels-last", "off", "--compile", "off", "--log-every", "1", "--resume"),
        *("--save-every", "1" if saved else "1000"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line.startswith("step 2/") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        begin, *_, end = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert "There is no state in" in begin
    if saved:
        step = int(end.partition("goes on from step ")[2].partition(",")[0])
        assert torch.load(run / STATE_FILE, weights_only=True)["step"] == step >= 1
    else:
        assert "before the first state was saved (--save-every 1000)" in end
        assert "begins anew" in end
        assert "--resume" not in end
        assert not (run / STATE_FILE).exists()
