"""`cmt data check` counts what is there and finds what cannot be read."""

import json
import os
import shutil
from pathlib import Path

import pytest

from model.cli import main
from tests.paths import MINI
from training.datasets import LAYOUTS, DatasetName
from training.datasets.check import CameraCount, check_dataset


def test_counts_of_both_sides(regdb_root: Path) -> None:
    found = check_dataset(LAYOUTS[DatasetName.REGDB], regdb_root)
    assert found.counts["identities"] == 8
    assert found.counts["images"] == 48
    assert found.counts["training identities"] == found.counts["test identities"] == 4
    assert found.counts["training visible images"] == found.counts["test infrared images"] == 12
    assert found.cameras == [CameraCount("rgb", 1, 8, 24), CameraCount("ir", 2, 8, 24)]
    assert (found.unreadable, found.one_modality, found.empty, found.notes) == ([], {}, [], [])


def test_a_set_without_its_test_list_says_what_is_missing() -> None:
    found = check_dataset(LAYOUTS[DatasetName.SYSU], MINI)
    assert found.counts["training identities"] == 5
    assert found.counts["training visible images"] == 40
    assert "test identities" not in found.counts
    held_back, missing = found.notes
    assert "val_id.txt are held back" in held_back
    assert "test_id.txt" in missing


def test_every_split_of_a_set_is_looked_at(regdb_root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(regdb_root, tmp_path / "set"))
    (root / "idx" / "test_thermal_7.txt").unlink()
    (note,) = check_dataset(LAYOUTS[DatasetName.REGDB], root).notes
    assert note.startswith("Split 7: ")
    assert "test_thermal_7.txt" in note


def test_published_counts_are_those_of_the_papers() -> None:
    published = {name: layout.published for name, layout in LAYOUTS.items()}
    assert published[DatasetName.SYSU]["training identities"] == 395
    assert published[DatasetName.SYSU]["training visible images"] == 22258
    assert published[DatasetName.SYSU]["training infrared images"] == 11909
    assert published[DatasetName.SYSU]["test infrared images"] == 3803
    assert published[DatasetName.REGDB]["identities"] == 412
    assert published[DatasetName.REGDB]["images"] == 8240
    assert published[DatasetName.LLCM] == {
        "identities": 1064,
        "images": 46767,
        "training identities": 713,
        "test identities": 351,
    }


def test_truncated_and_foreign_files_are_named(
    folder_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(folder_root, tmp_path / "set"))
    truncated, foreign = root / "rgb" / "ann" / "0.png", root / "ir" / "12" / "1.png"
    truncated.write_bytes(truncated.read_bytes()[:-40])
    foreign.write_text("no image")
    shutil.rmtree(root / "ir" / "3")
    (root / "ir" / "3").mkdir()
    out = tmp_path / "check.json"
    arguments = ["data", "check", str(root), "--json", str(out)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"Unreadable: {truncated}: " in printed
    assert f"Unreadable: {foreign}: " in printed
    assert "2 of 14 files are unreadable" in printed
    written = json.loads(out.read_text())
    assert {path for path, _ in written["unreadable"]} == {str(truncated), str(foreign)}
    assert written["one_modality"] == {"3": str(root / "rgb" / "3")}
    assert written["empty"] == [str(root / "ir" / "3")]
    assert f"3: only {root / 'rgb' / '3'}" in printed
    assert f"Empty: {root / 'ir' / '3'}" in printed


def test_what_is_not_used_is_named_and_shown_without_being_obeyed(
    folder_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(folder_root, tmp_path / "set"))
    thumbnails = root / "rgb" / "ann" / "@eaDir"
    (thumbnails / "0.png").mkdir(parents=True)
    assert main(["data", "check", str(root)]) == 0
    printed = capsys.readouterr().out
    assert f"Left alone, of other programs or read already: 1, the first is {thumbnails}" in printed
    assert "Empty" not in printed
    pipe = root / "rgb" / "ann" / "\x1b[31m[red].png"
    os.mkfifo(pipe)
    broken = Path(os.fsdecode(os.fsencode(root / "ir" / "ann") + b"/caf\xe9.png"))
    broken.write_bytes(b"")
    out = tmp_path / "check.json"
    assert main(["data", "check", str(root), "--json", str(out)]) == 1
    printed = capsys.readouterr().out
    assert f"Not used: {pipe.parent}/\\x1b[31m[red].png: is a pipe, not a file" in printed
    assert f"Unreadable: {broken.parent}/caf\\xe9.png: " in printed
    assert "\x1b" not in printed
    written = json.loads(out.read_text())
    assert [one["path"] for one in written["skipped"]] == [str(pipe), str(thumbnails)]


@pytest.mark.parametrize("name", ["regdb", "llcm", "folder"])
def test_the_command_on_sound_sets(
    request: pytest.FixtureRequest, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = request.getfixturevalue(f"{name}_root")
    assert main(["data", "check", str(root), "--dataset", name]) == 0
    printed = capsys.readouterr().out
    assert "0 of" in printed
    assert ("differs" in printed) == (name != "folder")
    assert main(["data", "check", str(root), "--dataset", "sysu"]) == 1
    error = capsys.readouterr().err
    assert "cam1" in error
    assert "docs/training.md#sysu" in error
