"""`make gpu-check` where there is no GPU, and what it makes of parts that end in every way."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points
from inspect import signature
from pathlib import Path

import pytest
import torch

from scripts import gpu_check
from scripts.gpu_check import Part
from tests.paths import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_would_run(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "scripts.gpu_check", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "finds no CUDA device here, so nothing was run" in answer.stdout
    assert not (tmp_path / "out").exists()
    for room in gpu_check.ROOMS:
        for file in gpu_check.marked_files(room):
            assert str(file.relative_to(ROOT)) in answer.stdout
    commands = [line.strip() for line in answer.stdout.splitlines() if line.startswith("  cmt ")]
    assert [command.split()[2] for command in commands] == [
        *("rescore", "recall", "embed", "train", "train", "serve")
    ]
    assert "--sizes 1000000 --queries 1,32" in commands[0]
    assert ("--recipe paper" in commands[3], "--recipe compact" in commands[4]) == (True, True)


def test_the_limits_of_the_parts_fit_into_the_eight_minutes(tmp_path: Path) -> None:
    planned = gpu_check.parts(tmp_path, 1000)
    assert sum(part.seconds for part in planned) <= gpu_check.SECONDS - 10


def test_every_command_is_one_that_the_benchmarks_take(tmp_path: Path) -> None:
    planned = gpu_check.parts(tmp_path, 1000)
    for part in (part for part in planned if "pytest" not in part.command):
        (benchmark,) = entry_points(group="cmt.benchmarks", name=part.command[4])
        taken = signature(benchmark.load()).parameters
        given = {word[2:].replace("-", "_") for word in part.command if word.startswith("--")}
        assert {"device", "json"} <= given
        assert given <= taken.keys(), part.name


def test_every_marked_file_is_run() -> None:
    found = {file for room in gpu_check.ROOMS for file in gpu_check.marked_files(room)}
    others = set((ROOT / "tests").rglob("*.py")) - found - {Path(__file__)}
    assert len(found) >= 3
    assert not [file for file in others if "mark.gpu" in file.read_text()]


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("print('done')", "ok"),
        ("print('not measured: this')", "ok, but for what is not measured; see part.log"),
        ("raise SystemExit(3)", "failed with status 3; see part.log"),
        ("import no_such_package", "not run: no_such_package not installed"),
        ("raise SystemExit(\"Error: the module 'faiss' is not\")", "not run: faiss not installed"),
        ("import time; time.sleep(60)", "cut off after 1 seconds; see part.log"),
    ],
)
def test_a_part_ends_in_one_of_these_ways(code: str, ended: str, tmp_path: Path) -> None:
    part = Part("part", 1, (sys.executable, "-c", code))
    seconds = 1 if "sleep" in code else 60
    assert gpu_check.run(part, tmp_path, seconds, {})["ended"] == ended


def test_a_missing_package_hides_no_failure(tmp_path: Path) -> None:
    (tmp_path / "test_lacks.py").write_text("import no_such_package\n")
    (tmp_path / "test_has.py").write_text("def test_a(): pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tmp_path)]
    options = ["--continue-on-collection-errors", f"--junitxml={tmp_path / 'tests.xml'}"]

    def ended() -> str:
        (tmp_path / "tests").mkdir(exist_ok=True)
        part = Part("tests", 60, (*command, *options))
        entry = gpu_check.run(part, tmp_path, 60, gpu_check.with_project(tmp_path))
        return gpu_check.of_tests(entry["ended"], gpu_check.tests_of(tmp_path / "tests.xml"))

    assert ended() == "ok for 1 tests; not run: no_such_package not installed"
    (tmp_path / "test_fails.py").write_text("def test_b(): assert False\n")
    assert ended() == "failed; see the log"


def test_the_commands_are_found_where_the_project_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gpu_check, "version", nothing)
    environment = gpu_check.with_project(tmp_path)
    code = (
        "import json; from importlib.metadata import entry_points; "
        "print(json.dumps([one.name for one in entry_points(group='cmt.benchmarks')]))"
    )
    told = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, capture_output=True, check=True
    )
    assert {"rescore", "embed", "train", "serve"} <= set(json.loads(told.stdout))
