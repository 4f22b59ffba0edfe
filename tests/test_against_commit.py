"""What the comparison of two commits starts from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts.against_commit import Side, different, main, unpack
from tests.paths import ROOT


def test_another_commit_runs_its_own_code(tmp_path: Path) -> None:
    unpack("HEAD", tmp_path / "tree")
    (tmp_path / "tree" / "model" / "cli.py").write_text("def main(): return 'its own'\n")
    side = Side(tmp_path / "tree", tmp_path / "data")
    answer = subprocess.run(side.cmt, capture_output=True, text=True, cwd=ROOT)
    assert answer.stderr.strip() == "its own"


def test_a_commit_that_git_does_not_know_is_one_sentence() -> None:
    with pytest.raises(SystemExit, match="no-such-commit"):
        main(["no-such-commit"])


def test_no_two_crops_are_equal(tmp_path: Path) -> None:
    image = ROOT / "docs" / "images" / "contact-sheet.png"
    files = different([image], 3, tmp_path / "crops")
    assert len({file.read_bytes() for file in files}) == 3
