"""What one service process holds open, made in order and closed in the reverse."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TypedDict

from service.embedder import Embedder
from service.gallery import Gallery
from service.keys import Keyring
from service.pipeline import Pipeline
from service.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """Handed to every request."""

    settings: Settings
    keyring: Keyring
    embedder: Embedder
    gallery: Gallery
    pipeline: Pipeline


class State(TypedDict):
    """The application's lifespan state: `request.state.resources`."""

    resources: Resources


@contextmanager
def open_resources(settings: Settings) -> Iterator[Resources]:
    """Load the checkpoint and open the gallery.

    Raises CheckpointError and ServiceError (a locked or unwritable data folder), each one sentence.
    """
    embedder = Embedder(
        settings.checkpoint,
        device=settings.device,
        runtime=settings.runtime,
        cache_dir=settings.data_dir / "cache",
    )
    with closing(embedder):
        gallery = Gallery.open(
            settings.data_dir,
            embedder.info,
            device=embedder.device,
            database_url=settings.database_url,
            candidates=settings.candidates,
            index=settings.index,
        )
        with closing(gallery):
            log.info(
                "%d items; %s on %s, %s",
                len(gallery),
                embedder.runtime,
                embedder.device,
                embedder.precision,
            )
            yield Resources(
                settings=settings,
                keyring=Keyring(settings.api_keys_file),
                embedder=embedder,
                gallery=gallery,
                pipeline=Pipeline(embedder, gallery, settings),
            )
