"""Whom a network learnt from is known again: through its ancestors, in copies, and nobody else."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from model import CMT, load_checkpoint, save_checkpoint
from model.cli import main
from model.training_facts import LearntPeople
from tests.training.conftest import draw
from training.datasets import LAYOUTS, DatasetError, DatasetName
from training.learnt import known_people, learnt_people, refuse_known_people, united

FOLDER = DatasetName.FOLDER
SMALL = {
    "model": {
        "backbone": "resnet18",
        "width": 0.125,
        "dim": 16,
        "heads": 4,
        "input_height": 96,
        "input_width": 32,
    },
    "identities": 2,
    "images": 2,
    "precision": "float32",
    "stages": [{"steps": 1, "lr": 1e-3}],
}


def people(root: Path, names: Iterable[object], seed: int = 0) -> Path:
    """A folder of these people, three images in each kind of light, no two files alike."""
    for number, name in enumerate(names):
        for light, modality in enumerate(("rgb", "ir")):
            for shot in range(3):
                draw(
                    root / modality / str(name) / f"{shot}.png",
                    100 * seed + number,
                    10 * light + shot,
                )
    return root


def listed(root: Path, *names: object) -> Path:
    path = root / f"{'-'.join(map(str, names))}.txt"
    path.write_text(",".join(map(str, names)))
    return path


def train(root: Path, run: Path, *more: object) -> Path:
    recipe = run.with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(SMALL))
    command = ("train", "--dataset", "folder", "--root", root, "--run", run, "--recipe", recipe)
    options = ("--device", "cpu", "--channels-last", "off", "--compile", "off", *more)
    assert main([*map(str, command + options)]) == 0
    return run / "checkpoint.safetensors"


def evaluate(root: Path, checkpoint: Path, *more: object) -> int:
    command = ("evaluate", "--dataset", "folder", "--root", root, "--checkpoint", checkpoint)
    return main([*map(str, (*command, "--device", "cpu", *more))])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "was trained on" in error
    return error


def test_people_are_handed_on_through_every_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = people(tmp_path / "set", ["ann", "bob", "3", "4", "5", "6", "7", "8"])
    first = train(root, tmp_path / "a", "--train-ids", listed(tmp_path, "ann", "bob"))
    second = train(root, tmp_path / "b", "--train-ids", listed(tmp_path, 3, 4), "--start", first)
    third = train(root, tmp_path / "c", "--train-ids", listed(tmp_path, 5, 6), "--start", second)
    assert load_checkpoint(third)[1].training["identities"] == [5, 6]
    held_out = ("--validation-ids", listed(tmp_path, "bob", 7))
    train(root, tmp_path / "d", "--train-ids", listed(tmp_path, 5, 6), "--start", second, *held_out)
    assert "1 of the 2 held-out identities are among those whom" in capsys.readouterr().err
    for ids, known in (
        (("ann", 7, 8), "1 of these 3 identities (ann)"),
        ((3, 4, 7), "2 of these 3 identities (3, 4)"),
        ((5, 7), "1 of these 2 identities (5)"),
    ):
        assert evaluate(root, third, "--ids", listed(tmp_path, *ids)) == 1
        assert known in refusal(capsys)
    assert evaluate(root, third, "--ids", listed(tmp_path, 7, 8)) == 0
    # The other commands that measure on people ask the same.
    everyone = ("--dataset", "folder", "--root", root, "--ids", listed(tmp_path, "ann", 7, 8))
    capsys.readouterr()
    calibrate = ("calibrate", "--checkpoint", third, *everyone, "--device", "cpu")
    assert main([*map(str, calibrate)]) == 1
    assert "(ann)" in refusal(capsys)
    tsne = ("ablate", "tsne", "--checkpoint", third, *everyone, "--people", 3)
    assert main([*map(str, (*tsne, "--plot", tmp_path / "x.png", "--device", "cpu"))]) == 1
    assert "(ann)" in refusal(capsys)


def test_people_on_whom_weights_were_chosen_are_not_measured_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = people(tmp_path / "set", ["1", "2", "3", "4", "val", "wal", "7", "8"])
    held_out = ("--validation-ids", listed(tmp_path, "val", "wal"), "--train-ids")
    some = (*held_out, listed(tmp_path, 1, 2, "val"))
    chosen = train(root, tmp_path / "a", *some, "--selection", "val")
    child = train(root, tmp_path / "b", "--train-ids", listed(tmp_path, 3, 4), "--start", chosen)
    ids = ("--ids", listed(tmp_path, 1, "val", "wal", 7))
    for checkpoint in (chosen, child):
        capsys.readouterr()
        assert evaluate(root, checkpoint, *ids) == 1
        assert (
            "was trained on 1 of these 4 identities (1) and selected by validation on 2 of them "
            "(wal, val); choose others with --ids."  # ordered by what their names become
        ) in refusal(capsys)
        assert evaluate(root, checkpoint, "--ids", listed(tmp_path, 7, 8)) == 0
    # Curves may be fitted on them, and figures that choose nothing are only shown.
    everyone = ("--dataset", "folder", "--root", root, "--ids", listed(tmp_path, "val", "wal"))
    capsys.readouterr()
    main([*map(str, ("calibrate", "--checkpoint", chosen, *everyone, "--device", "cpu"))])
    assert "selected" not in capsys.readouterr().err
    shown = train(root, tmp_path / "c", *some)
    assert evaluate(root, shown, "--ids", listed(tmp_path, "val", "wal")) == 0


def test_copies_are_recognised_and_namesakes_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = people(tmp_path / "mine", range(1, 5))
    checkpoint = train(mine, tmp_path / "run")
    other = people(tmp_path / "other", range(1, 5), seed=1)
    assert evaluate(other, checkpoint) == 0
    # Moved, renumbered, and with one image of each kind left.
    copy = people(tmp_path / "copy", ["x", "y"], seed=2)
    for modality in ("rgb", "ir"):
        (copy / modality / "zoe").mkdir()
        shutil.copy(mine / modality / "3" / "1.png", copy / modality / "zoe" / "other name.png")
    capsys.readouterr()
    assert evaluate(copy, checkpoint) == 1
    assert "trained on 1 of these 3 identities (zoe); choose others with --ids." in refusal(capsys)
    assert evaluate(copy, checkpoint, "--ids", listed(tmp_path, "x", "y")) == 0


def test_a_stated_name_says_whose_numbers_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = train(
        people(tmp_path / "spring", range(1, 5)), tmp_path / "run", "--dataset-name", "campus"
    )
    # Other images of the same people, which no file tells.
    autumn = people(tmp_path / "autumn", range(1, 5), seed=1)
    capsys.readouterr()
    assert evaluate(autumn, checkpoint, "--dataset-name", "campus") == 1
    error = refusal(capsys)
    assert "4 of these 4 identities (1, 2, 3, 4)" in error
    assert "name their set with --dataset-name" in error
    assert evaluate(autumn, checkpoint, "--dataset-name", "station") == 0
    assert evaluate(autumn, checkpoint, "--dataset-name", "campus ") == 2
    # The name goes into the checkpoint, so a resumed run has the one that it began with.
    again = ["train", "--dataset", "folder", "--root", tmp_path / "spring", "--run"]
    again += [tmp_path / "run", "--recipe", tmp_path / "run.yaml", "--device", "cpu", "--resume"]
    for given, said in (((), "None"), (("--dataset-name", "station"), "station")):
        capsys.readouterr()
        assert main([*map(str, (*again, *given))]) == 1
        error = f"holds a run with dataset name campus, here {said}; resume with the same"
        assert error in capsys.readouterr().err
    assert main([*map(str, (*again, "--dataset-name", "campus"))]) == 0


def test_numbers_of_the_public_layouts_need_no_files(
    tiny_model: CMT, tmp_path: Path, regdb_root: Path
) -> None:
    """As in checkpoints of earlier releases, which kept no digests."""
    samples = LAYOUTS[DatasetName.REGDB].images(regdb_root)
    for dataset in (DatasetName.SYSU, DatasetName.REGDB, DatasetName.LLCM, FOLDER):
        file = tmp_path / f"{dataset}.safetensors"
        save_checkpoint(
            file, tiny_model, training={"dataset": dataset.value, "identities": [1, 2, 90]}
        )
        _, info = load_checkpoint(file)
        with pytest.raises(DatasetError, match=r"2 of these 8 identities \(1, 2\)"):
            refuse_known_people(info, samples, dataset, None)
        facts = {"dataset": dataset.value, "held_out": [3, 91], "selection": "val"}
        save_checkpoint(file, tiny_model, training=facts)
        selected = load_checkpoint(file)[1]
        with pytest.raises(DatasetError, match=r"selected by validation on 1 of these .* \(3\)"):
            refuse_known_people(selected, samples, dataset, None)
        refuse_known_people(info, samples, dataset, "another set")
        if dataset is not DatasetName.REGDB:  # other people with the same numbers
            refuse_known_people(info, samples, DatasetName.REGDB, None)


def test_a_file_of_several_people_identifies_nobody(tmp_path: Path) -> None:
    first = people(tmp_path / "first", ["1", "2", "3"])
    second = people(tmp_path / "second", ["1", "2", "3"], seed=1)
    black = draw(tmp_path / "black.png", 99, 0)
    for root in (first, second):
        for person in ("1", "2"):
            shutil.copy(black, root / "rgb" / person / "black.png")
    learnt = learnt_people(FOLDER, None, LAYOUTS[FOLDER].images(first))
    assert known_people([learnt], LAYOUTS[FOLDER].images(second), FOLDER, None) == set()
    shutil.copy(first / "ir" / "2" / "0.png", second / "ir" / "3" / "again.png")
    assert known_people([learnt], LAYOUTS[FOLDER].images(second), FOLDER, None) == {3}


def test_sets_of_one_name_are_united() -> None:
    def one(name: str | None, identities: list[int], images: str) -> LearntPeople:
        return LearntPeople(dataset="sysu", name=name, identities=identities, images=images)

    sets = [one("a", [3, 1], "AAAAAAAA"), one(None, [1], ""), one("a", [2, 3], "AAAAAAAABBBBBBBB")]
    assert united(sets) == [one("a", [1, 2, 3], "AAAAAAAABBBBBBBB"), one(None, [1], "")]
    assert united(united(sets)) == united(sets)
