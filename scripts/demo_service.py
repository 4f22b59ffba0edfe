"""The service on the examples, for scripts that picture it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from service.client import Client, Entry
from service.client.bulk import read_manifest
from service.server import running
from service.settings import Settings

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CHECKPOINT = EXAMPLES / "compact.safetensors"
IMAGES = ROOT / "docs" / "images"


STARTED = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)
"""When the first crop is said to be taken; the next ones follow every ten minutes."""


def timed(entry: Entry, number: int) -> Entry:
    """The entry with a time, so that there is something to see on the timeline."""
    captured = STARTED + timedelta(minutes=10 * number)
    return replace(entry, item=entry.item.model_copy(update={"captured_at": captured}))


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
            for result in client.enroll_many(timed(entry, n) for n, entry in enumerate(entries)):
                assert result.item is not None, result.reason
            yield url, client
