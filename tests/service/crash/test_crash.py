"""A killed process loses nothing that it acknowledged: a few rounds of `tests/service/crash`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.paths import ROOT
from tests.service.crash.run import app


@pytest.mark.parametrize(("subject", "rounds"), [("gallery", 5), ("service", 3)])
def test_what_was_acknowledged_survives_kills(
    subject: str, rounds: int, tiny_checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(ROOT)  # also of the processes that are killed
    file = tmp_path / "crash.json"
    options = ["--rounds", str(rounds), "--seed", "4", "--subject", subject]
    options += ["--checkpoint", str(tiny_checkpoint), "--json", str(file)]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert report["rounds"] == sum(report["kills"].values()) == rounds
    assert report["enrollments_acknowledged"] > report["deletes_acknowledged"] > 0
    assert report["verified_items"] >= report["left_at_the_end"] > 0
