"""`cmt data check` counts what is there and finds what cannot be read."""

import json
import shutil
from pathlib import Path

import pytest

from model.cli import main
from training.datasets import LAYOUTS, DatasetName
from training.datasets.check import CameraCount, check_dataset

MINI = Path(__file__).parents[1] / "data" / "synth-sysu-mini"


def test_counts_of_both_sides(regdb_root):
    found = check_dataset(LAYOUTS[DatasetName.REGDB], regdb_root)
    assert found.counts["identities"] == 8
    assert found.counts["images"] == 48
    assert found.counts["training identities"] == found.counts["test identities"] == 4
    assert found.counts["training visible images"] == found.counts["test infrared images"] == 12
    assert found.cameras == [CameraCount("rgb", 1, 8, 24), CameraCount("ir", 2, 8, 24)]
    assert (found.unreadable, found.one_modality, found.notes) == ([], [], [])


def test_a_set_without_its_test_list_says_what_is_missing():
    found = check_dataset(LAYOUTS[DatasetName.SYSU], MINI)
    assert found.counts["training identities"] == 8
    assert found.counts["training visible images"] == 62
    assert "test identities" not in found.counts
    assert len(found.notes) == 1 and "test_id.txt" in found.notes[0]


def test_published_counts_are_those_of_the_papers():
    published = {name: layout.published for name, layout in LAYOUTS.items()}
    assert published[DatasetName.SYSU]["training identities"] == 395
    assert published[DatasetName.SYSU]["training visible images"] == 22258
    assert published[DatasetName.SYSU]["training infrared images"] == 11909
    assert published[DatasetName.SYSU]["test infrared images"] == 3803
    assert published[DatasetName.REGDB]["identities"] == 412
    assert published[DatasetName.REGDB]["images"] == 8240
    assert published[DatasetName.LLCM] == {"training identities": 713, "test identities": 351}


def test_truncated_and_foreign_files_are_named(folder_root, tmp_path, capsys):
    root = Path(shutil.copytree(folder_root, tmp_path / "set"))
    truncated, foreign = root / "rgb" / "ann" / "0.png", root / "ir" / "12" / "1.png"
    truncated.write_bytes(truncated.read_bytes()[:-40])
    foreign.write_text("no image")
    shutil.rmtree(root / "ir" / "3")
    out = tmp_path / "check.json"
    arguments = ["data", "check", str(root), "--dataset", "folder", "--json", str(out)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"Unreadable: {truncated}: " in printed
    assert f"Unreadable: {foreign}: " in printed
    assert "2 of 14 files are unreadable" in printed
    written = json.loads(out.read_text())
    assert {path for path, _ in written["unreadable"]} == {str(truncated), str(foreign)}
    assert written["one_modality"] == [3]


@pytest.mark.parametrize("name", ["regdb", "llcm", "folder"])
def test_the_command_on_sound_sets(request, name, capsys):
    root = request.getfixturevalue(f"{name}_root")
    assert main(["data", "check", str(root), "--dataset", name]) == 0
    printed = capsys.readouterr().out
    assert "0 of" in printed
    assert ("differs" in printed) == (name != "folder")
    assert main(["data", "check", str(root), "--dataset", "sysu"]) == 1
    error = capsys.readouterr().err
    assert "cam1" in error and "docs/training.md#sysu" in error
