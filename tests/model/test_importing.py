"""What makes importing much faster leaves nothing behind, and does what it says."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from model.importing import torch_library, without_collections
from tests.paths import ROOT


def test_collections_go_on_afterwards() -> None:
    with without_collections():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_torch_finds_its_library_loaded() -> None:
    code = """
import sys
from model.importing import torch_library
with torch_library():
    pass
print("torch" in sys.modules, "libtorch_cpu.so" in open("/proc/self/maps").read())
import torch
print(float(torch.ones(2, 2).matmul(torch.ones(2, 2)).sum()))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert ran.stdout.split() == ["False", "True", "8.0"]


def test_without_torch_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.importing.find_spec", lambda _: None)
    with torch_library():
        pass
