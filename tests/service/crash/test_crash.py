"""A killed process loses nothing that it acknowledged: a few rounds of `tests/service/crash`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.mark.parametrize(("subject", "rounds"), [("gallery", 5), ("service", 3)])
def test_what_was_acknowledged_survives_kills(
    subject: str, rounds: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "crash.json"
    options = ["--rounds", str(rounds), "--seed", "4", "--subject", subject]
    options += ["--checkpoint", str(tiny_checkpoint), "--json", str(file)]
    result = subprocess.run(
        [sys.executable, "-m", "tests.service.crash.run", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(file.read_text())
    assert report["rounds"] == sum(report["kills"].values()) == rounds
    assert report["enrollments_acknowledged"] > report["deletes_acknowledged"] > 0
    assert report["verified_items"] >= report["left_at_the_end"] > 0
