"""Promises about the tree itself: who imports whom, what is pinned, what files refer to."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.paths import ROOT

PACKAGES = {"model", "service", "training"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imports(file: Path) -> set[str]:
    """Top-level names that a source file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute, so that rooms stay visible"
            found.add((node.module or "").split(".")[0])
    return found


def mistaken_asserts(source: bytes) -> list[int]:
    """Lines of asserts like `assert a, b == c`, which asserts `a` alone."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assert)
        and isinstance(node.msg, ast.Compare | ast.BoolOp | ast.UnaryOp)
    ]


def test_no_assert_has_a_comparison_for_its_message() -> None:
    """None of the linters finds these."""
    assert mistaken_asserts(b"assert a, b == c\nassert d, f'{e}'\nassert f, not g") == [1, 3]
    files = sorted((ROOT / "tests").rglob("*.py"))
    found = {str(file): mistaken_asserts(file.read_bytes()) for file in files}
    assert len(found) > 100
    assert not {file: lines for file, lines in found.items() if lines}


def pins(file: str = "constraints.txt") -> dict[str, str]:
    """Package → version of a file of constraints."""
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for: to build, to run, and in every extra but `gpu`.

    That one has versions of its own, and tests in deploy/test_dockerfile.py.
    """
    project = PROJECT["project"]
    lines = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    for name, extra in project["optional-dependencies"].items():
        lines += extra if name != "gpu" else []
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.name != project["name"]]  # an extra that takes in another


def test_every_requirement_is_pinned_to_a_version_that_it_allows() -> None:
    pinned = pins()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pinned[name]), str(requirement)


@pytest.mark.parametrize(
    ("package", "extras"),
    # model.graphs converts to OpenVINO for both rooms that run it; it imports it only then.
    [
        ("model", ["cpu"]),
        ("service", ["cpu", "bench", "bulk", "otel", "s3", "scale"]),
        ("training", ["train", "int8"]),
    ],
)
def test_every_import_is_required_where_it_is_used(package: str, extras: list[str]) -> None:
    project = PROJECT["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    required = {canonicalize_name(Requirement(line).name) for line in lines}
    distributions = packages_distributions()
    for file in (ROOT / package).rglob("*.py"):
        # pydantic_core is pydantic's other half: each release pins the one of the other. Triton
        # comes with a torch that is built for CUDA; without it the index goes without its kernels.
        for name in (
            imports(file) - PACKAGES - sys.stdlib_module_names - {"pydantic_core", "triton"}
        ):
            providers = {canonicalize_name(provider) for provider in distributions[name]}
            assert providers & required, f"{file} imports {name}, which nothing here requires"


def test_constraints_are_exact_and_without_a_local_version() -> None:
    for name, version in pins().items():
        assert name == canonicalize_name(name)
        assert Version(version).local is None, f"{name}=={version} exists on one machine only"


def test_faiss_comes_in_exactly_one_build() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for extra, lines in extras.items():
        builds = [line for line in lines if line.startswith("faiss")]
        assert len(builds) == (extra in {"cpu", "gpu"}), extra


def test_what_is_not_python_is_installed_too() -> None:
    package_data = PROJECT["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        declared = {
            file
            for pattern in package_data.get(package, [])
            for file in ROOT.glob(f"{package}/{pattern}")
        }
        others = {
            file
            for file in (ROOT / package).rglob("*")
            if file.is_file() and file.suffix not in {".py", ".pyc"}
        }
        assert others <= declared, "name them in [tool.setuptools.package-data]"


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions as (name, arguments), continuation lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (name, arguments)
        for line in joined.splitlines()
        if line.strip()
        for name, _, arguments in [line.partition(" ")]
    ]


def test_the_image_copies_only_files_that_exist_and_that_docker_may_see() -> None:
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copies = [
        argument
        for name, arguments in instructions((ROOT / "docker/Dockerfile").read_text())
        if name == "COPY" and "--from" not in arguments
        for argument in arguments.split()[:-1]
        if not argument.startswith("--")
    ]
    assert copies
    for pattern in copies:
        assert list(ROOT.glob(pattern)), f"the Dockerfile copies {pattern}, which is not there"
        assert pattern in allowed, f".dockerignore hides {pattern}"


def test_the_image_takes_exactly_one_checkpoint() -> None:
    assert len(list((ROOT / "examples").rglob("*.safetensors"))) == 1


def test_the_image_runs_unprivileged_and_reports_its_health() -> None:
    last_stage = instructions((ROOT / "docker/Dockerfile").read_text())
    assert ("USER", "10001") in last_stage
    (check,) = (text for name, text in last_stage if name == "HEALTHCHECK")
    assert check.endswith('CMD ["health"]')


def makefile_targets() -> set[str]:
    """Targets of the Makefile that a person may ask for."""
    return set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_make_targets_that_documents_and_ci_name_exist() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    code = "\n".join(
        block
        for document in documents
        for block in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", document.read_text(), re.DOTALL)
        for block in block
    )
    named = set(re.findall(r"^make ([a-z-]+)", code + (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert {"demo", "test", "lint"} <= named
    assert named <= makefile_targets()


def test_documents_link_only_to_files_that_exist() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_make_refuses_an_old_python_with_a_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text(
        '#!/bin/sh\nexec python3 -c "import sys; sys.version_info = (3, 9); '
        'sys.version = \'3.9.1\'; exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    answer = subprocess.run(
        ["make", "--silent", f"PYTHON={old}", ".venv/bin/python"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"Python 3.11 or newer is needed and {old} is 3.9.1")
    assert not (tmp_path / ".venv").exists()


def test_no_committed_file_is_large() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(files) > 20
    assert [f for f in files if f.is_file() and f.stat().st_size > 13_000_000] == []
