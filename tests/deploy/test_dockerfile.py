"""What the Dockerfile's commands do, run by a real shell and a real pip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.paths import ROOT
from tests.test_project import PROJECT, instructions, pins


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty one, in place of the image's /opt/cmt."""
    folder = tmp_path_factory.mktemp("image") / "cmt"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


def installed(environment: Path, source: Path, index: str) -> subprocess.CompletedProcess[str]:
    """Run the command of the image for CPUs that installs what the project needs."""
    (command,) = (
        re.sub(r"--mount=\S+", "", arguments).replace("/opt/cmt", str(environment))
        for name, arguments in instructions((ROOT / "docker/Dockerfile").read_text())
        if name == "RUN" and "TORCH_INDEX" in arguments
    )
    for name in ("pyproject.toml", "constraints.txt", "docker/constraints", "docker/requirements"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return subprocess.run(
        ["sh", "-c", command],
        cwd=source,
        env={
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
            "EXTRA": "cpu",
            "TORCH_INDEX": index,
            "PIP_CONSTRAINT": str(source / "versions.txt"),
            "PIP_CONFIG_FILE": os.devnull,  # indexes of this machine are none of the image's
            "PIP_RETRIES": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


def put_wheel(index: Path, name: str, files: dict[str, str]) -> None:
    """A wheel of the pinned version on an index that is a folder."""
    version = pins()[name]
    facts = f"{name}-{version}.dist-info"
    files = files | {
        f"{facts}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{facts}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{facts}/RECORD": "",
    }
    wheel = index / name / f"{name}-{version}-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')


def assert_refused(answer: subprocess.CompletedProcess[str], index: str) -> None:
    assert answer.returncode == 1
    told = answer.stderr.splitlines()[-1]
    assert told.startswith(f"torch for CPUs cannot be had from TORCH_INDEX, {index}: check")
    assert "openvino" not in answer.stdout  # nothing else was begun


def test_without_the_index_of_cpu_builds_the_image_takes_no_other_torch(
    environment: Path, tmp_path: Path
) -> None:
    nobody = "http://127.0.0.1:9/whl/cpu"
    answer = installed(environment, tmp_path, nobody)
    assert_refused(answer, nobody)
    assert "Collecting" not in answer.stdout


def test_an_index_whose_torch_brings_cuda_along_is_refused(
    environment: Path, tmp_path: Path
) -> None:
    index = tmp_path / "simple"
    put_wheel(index, "torch", {"torch/version.py": "cuda: Optional[str] = '13.0'\n"})
    put_wheel(index, "torchvision", {"torchvision/__init__.py": ""})
    answer = installed(environment, tmp_path, index.as_uri())
    assert "Successfully installed torch" in answer.stdout
    assert_refused(answer, index.as_uri())


def chosen(extra: str) -> dict[str, str]:
    """Package → version for the image of an extra."""
    command = [sys.executable, "docker/constraints", extra]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return dict(line.split("==") for line in told.splitlines())


def test_the_image_for_cpus_has_the_versions_that_the_tests_have() -> None:
    assert chosen("cpu") == pins()


def test_the_image_for_gpus_has_one_cuda_and_else_the_same_versions() -> None:
    own = pins("docker/constraints-gpu.txt")
    found = chosen("gpu")
    assert found == pins() | own
    cuda = {"cuda-toolkit", "nvidia-cuda-runtime", "nvidia-cuda-nvrtc"}
    assert {".".join(found[name].split(".")[:2]) for name in cuda} == {"13.2"}
    # Each package for a CUDA says in its name for which; none is for another.
    assert {major for name in found for major in re.findall(r"-cu(\d\d)$", name)} == {"13"}
    related = re.compile(r"torch(vision)?|triton|faiss-.*|(cuda|nvidia)-.*|(lib|rapids-).*")
    assert [name for name in own if not related.fullmatch(name)] == []
    assert [name for name in own if pins().get(name) == own[name]] == []


def test_every_requirement_of_the_image_for_gpus_is_pinned() -> None:
    project = PROJECT["project"]
    found = chosen("gpu")
    for line in [*project["dependencies"], *project["optional-dependencies"]["gpu"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), line


def test_the_index_of_cpu_builds_is_taken_unless_told_otherwise() -> None:
    dockerfile = instructions((ROOT / "docker/Dockerfile").read_text())
    assert ("ARG", "TORCH_INDEX=https://download.pytorch.org/whl/cpu") in dockerfile
