"""Who imports whom, as pyproject.toml states it, and what the light parts really load."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.paths import ROOT

HEAVY = ("torch", "torchvision", "numpy", "faiss", "openvino", "sqlalchemy", "alembic")
COMMANDS = (
    "",
    "query",
    "watch",
    "enroll",
    "keys",
    "keys create",
    "keys list",
    "keys revoke",
    "gallery",
    "gallery list",
    "gallery show",
    "gallery delete",
    "gallery export",
    "gallery versions",
    "gallery versions list",
    "gallery versions drop",
    "backup",
    "restore",
    "reembed",
)


def loaded(code: str, modules: tuple[str, ...] = HEAVY) -> set[str]:
    """Which of the modules a fresh interpreter has imported after `code`."""
    report = f"\nimport sys\nprint(*{{m for m in {modules} if m in sys.modules}}, file=sys.stderr)"
    result = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(result.stderr.splitlines()[-1].split())


def test_imports_go_one_way() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [linter, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_a_heavy_import_would_be_seen() -> None:
    assert loaded("from service.gallery import Gallery") >= {"torch", "faiss", "sqlalchemy"}


def test_the_index_loads_no_sql() -> None:
    index = loaded("import service.gallery.index.shard, service.gallery.index.snapshot")
    assert {"torch", "faiss"} <= index
    assert not index & {"sqlalchemy", "alembic"}


def test_a_checkpoint_is_read_without_torchs_compiler(tiny_checkpoint: Path) -> None:
    """It takes longer to import than the network to load."""
    code = f"from model import load_checkpoint; load_checkpoint({str(tiny_checkpoint)!r})"
    assert loaded(code, ("torch", "torch._dynamo", "sympy")) == {"torch"}


@pytest.mark.parametrize("module", ["service.client", "service.client.bulk", "model", "model.cli"])
def test_a_light_module_loads_nothing_heavy(module: str) -> None:
    assert loaded(f"import {module}") == set()


def test_commands_that_speak_http_load_nothing_heavy() -> None:
    lines = [f"assert main({[*name.split(), '--help']!r}) == 0, {name!r}" for name in COMMANDS]
    assert loaded("\n".join(["from model.cli import main", *lines])) == set()


def test_the_client_works_without_anything_heavy() -> None:
    """Nothing is imported late either, until there is a service to answer."""
    code = """
    from service.client import Client, Entry, Unreachable
    from service.client.bulk import find_images
    with Client("http://127.0.0.1:9") as client:
        for verb in (client.query, lambda image: list(client.enroll_many([Entry(image)]))):
            try:
                verb(b"image")
            except Unreachable:
                continue
            raise SystemExit("something answers on port 9")
    """
    assert loaded(textwrap.dedent(code)) == set()
