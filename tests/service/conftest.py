"""A real service on loopback, with the tiny checkpoint and small real crops."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
import torch

from model import CMT, load_checkpoint, save_checkpoint
from service.server import running
from service.settings import load_settings
from tests.conftest import alive
from tests.paths import MINI
from tests.service.object_server import bucket, object_server  # noqa: F401 - fixtures
from tests.service.places import make_place  # noqa: F401 - fixture
from tests.service.postgres import postgres, postgres_url  # noqa: F401 - fixtures
from tests.service.processes import kept_port
from tests.service.stores import open_store, store  # noqa: F401 - fixtures


class Serve(Protocol):
    """Starts a service on a data folder → its URL."""

    def __call__(self, data_dir: Path, **options: Any) -> AbstractContextManager[str]: ...


@pytest.fixture(scope="session")
def visible() -> list[Path]:
    """Crops of eight persons from a visible camera; the folder's name is the person."""
    return sorted((MINI / "cam1").glob("*/0001.jpg"))


@pytest.fixture(scope="session")
def image(visible: list[Path]) -> bytes:
    """One of them, as a client sends it."""
    return visible[0].read_bytes()


@pytest.fixture(scope="session")
def infrared() -> list[Path]:
    """Crops of the same persons from an infrared camera."""
    return sorted((MINI / "cam3").glob("*/0001.jpg"))


@pytest.fixture(scope="session")
def serve(tiny_checkpoint: Path) -> Serve:
    """Start a service; `options` are settings."""

    def start(data_dir: Path, **options: Any) -> AbstractContextManager[str]:
        defaults = {"checkpoint": tiny_checkpoint, "runtime": "torch", "port": 0}
        return running(load_settings(data_dir=data_dir, **{**defaults, **options}))

    return start


@pytest.fixture
def port() -> Iterator[int]:
    """A port for what this test starts; see `kept_port`."""
    with kept_port() as port:
        yield port


@pytest.fixture
def checkpoints(tiny_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints side by side, of one configuration."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    shutil.copy(tiny_checkpoint, first)
    _, info = load_checkpoint(tiny_checkpoint)
    torch.manual_seed(11)
    save_checkpoint(second, alive(CMT(info.config)).eval(), training={"dataset": "none"})
    return first, second


@pytest.fixture(scope="module")
def url(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that the tests of one module share."""
    with serve(tmp_path_factory.mktemp("data")) as address:
        yield address


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    """Plain HTTP to that service."""
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        yield client
