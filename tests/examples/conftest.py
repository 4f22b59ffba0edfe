"""A service as a process of its own, which the programs find by its address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import Client
from tests.service.processes import ServiceProcess


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path
) -> Iterator[ServiceProcess]:
    """One that the tests of a module share."""
    with ServiceProcess(tmp_path_factory.mktemp("data"), tiny_checkpoint) as process:
        yield process


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[Client]:
    """Its client; what the test enrolled is deleted afterwards."""
    with Client(service.url) as client:
        yield client
        for item in client.list(limit=1000).items:
            client.delete(item.id)
