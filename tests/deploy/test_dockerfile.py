"""What the Dockerfile's commands do, run by a real shell and a real pip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.test_project import instructions


def test_without_the_index_of_cpu_builds_the_image_takes_no_other_torch(tmp_path: Path) -> None:
    installing = [
        re.sub(r"--mount=\S+", "", arguments)
        for name, arguments in instructions((ROOT / "docker/Dockerfile").read_text())
        if name == "RUN" and "TORCH_INDEX" in arguments
    ]
    (command,) = installing
    for name in ("pyproject.toml", "constraints.txt", "docker/requirements"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    answer = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}",
            "EXTRA": "cpu",
            "TORCH_INDEX": "http://127.0.0.1:9/whl/cpu",  # nobody listens there
            "PIP_CONSTRAINT": str(tmp_path / "constraints.txt"),
            "PIP_RETRIES": "0",
            "PIP_CONFIG_FILE": os.devnull,  # indexes of this machine are none of the image's
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith("torch cannot be had from TORCH_INDEX, http:")
    assert "Collecting" not in answer.stdout
    assert not list((tmp_path / "venv").rglob("torch*"))
