"""The service on the examples, for scripts that picture it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.client import Client
from service.client.bulk import read_manifest, send
from service.server import running
from service.settings import Settings

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CHECKPOINT = EXAMPLES / "compact.safetensors"
IMAGES = ROOT / "docs" / "images"


@contextmanager
def demo_service() -> Iterator[tuple[str, Client]]:
    """Its address and a client; the example gallery is enrolled."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(checkpoint=CHECKPOINT, data_dir=Path(folder), port=0)
        with running(settings) as url, Client(url) as client:
            entries = read_manifest(
                EXAMPLES / "manifest.csv", [EXAMPLES / "gallery"], ignored=["role"]
            )
            failures = send(client, entries, lambda _: None)
            assert not failures, failures
            yield url, client
