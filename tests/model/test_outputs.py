"""Paths that cannot be written are refused before the work; what fails later is said at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.outputs import OutputError, Outputs, check_file, check_folder


def test_what_can_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere" / "yet.json")
    os.mkfifo(tmp_path / "pipe")
    for name in ("new.json", "old.json", "a/b/c.json", "link.json", "pipe", "x" * 240):
        check_file(tmp_path / name)
    check_file(Path("/dev/null"))
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "old.json", "pipe"]


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, reason in (
        (tmp_path, "is a folder; give the name of a file"),
        (Path(), "is a folder"),
        (tmp_path / "file" / "out.json", "file is a file, and would have to be a folder"),
        (tmp_path / "file" / "below" / "out.json", "file is a file, and would have to be a folder"),
        (tmp_path / "loop", "cannot be written"),
        (tmp_path / ("x" * 250), "File name too long"),
        (tmp_path / "a\0b", "cannot be written"),
        (Path("/proc/out.json"), "cannot be written"),
        (Path("/sys/below/out.json"), "cannot be written"),
    ):
        with pytest.raises(OutputError, match=reason) as refused:
            check_file(path)
        assert "\n" not in str(refused.value)
    with pytest.raises(OutputError, match="would have to be a folder"):
        check_folder(tmp_path / "file")


def test_one_file_that_fails_keeps_no_other_back(tmp_path: Path) -> None:
    outputs = Outputs()
    with outputs.attempt(Path("/dev/full")), Path("/dev/full").open("w") as full:
        full.write("{}")
    with outputs.attempt(tmp_path / "second.json"):
        (tmp_path / "second.json").write_text("{}")
    with outputs.attempt(tmp_path / "sheets"):
        (tmp_path / "sheets" / "1.png").write_text("")
    assert (tmp_path / "second.json").is_file()
    with pytest.raises(OutputError, match="printed above") as said:
        outputs.finish()
    assert "/dev/full: No space left on device; " in str(said.value)
    assert "sheets/1.png: No such file or directory; " in str(said.value)
    Outputs().finish()


COMMANDS = [
    "train --root x --run {}",
    "train --root x --run r --cache {}",
    "evaluate --dataset sysu --root x --checkpoint c --json {}",
    "evaluate --dataset sysu --root x --checkpoint c --plot {}.png",
    "evaluate --dataset sysu --root x --checkpoint c --sheets {}",
    "calibrate --checkpoint c --dataset sysu --root x --ids i --output {}",
    "calibrate --checkpoint c --dataset sysu --root x --ids i --json {}",
    "calibrate --checkpoint c --dataset sysu --root x --ids i --plot {}.svg",
    "calibrate --checkpoint {} --dataset sysu --root x --ids i",
    "ablate table3 --root x --eval-root x --recipe r --run {}",
    "ablate table3 --root x --eval-root x --recipe r --run r --markdown {}",
    "ablate sweep parts --root x --eval-root x --recipe r --run r --plot {}.pdf",
    "ablate tsne --checkpoint c --root x --plot {}.png",
    "ablate tsne --checkpoint c --root x --plot x.png --json {}",
    "data check x --json {}",
    "export --checkpoint c --output {}",
    "bench train --json {}",
    "bench evaluate --json {}",
    "bench embed --json {}",
    "bench scale --plot {}.png",
    "bench features --root x --output {}",
    "bench features --root x --cache {}",
    "bench recall --cache {}",
]


def test_every_command_checks_where_it_writes_before_it_reads(tmp_path: Path) -> None:
    """One process for all of them: the imports take longer than the checks."""
    (tmp_path / "file").write_text("")
    lines = [line.format(tmp_path / "file" / "out") for line in COMMANDS]
    code = (
        "import contextlib, io, sys; from model.cli import main\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said): status = main(line.split())\n"
        "    print(status, said.getvalue().strip().replace('\\n', '|'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    said = done.stdout.splitlines()
    assert len(said) == len(COMMANDS)
    for line, answer in zip(lines, said, strict=True):
        assert answer.startswith("2 Error: "), (line, answer)
        assert "is a file, and would have to be a folder; give another path" in answer, line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
