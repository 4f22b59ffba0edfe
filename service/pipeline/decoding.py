"""The processes that decode for one service. Loads no torch: they start before it is imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from service.images import Decoders
from service.images.decode import ImageLimits
from service.settings import Settings


class Decoding(NamedTuple):
    """Those of requests, and that of the self-check, which thus never waits behind uploads."""

    requests: Decoders
    checks: Decoders


@contextmanager
def decoding(settings: Settings) -> Iterator[Decoding]:
    """Start them as the settings say, and end them with the block. Raises RuntimeUnavailable."""
    with (
        closing(_decoders(settings, settings.decode_processes)) as requests,
        closing(_decoders(settings, 1)) as checks,
    ):
        yield Decoding(requests, checks)


def _decoders(settings: Settings, processes: int) -> Decoders:
    return Decoders(
        processes,
        ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
        seconds=settings.decode_timeout,
        keep_metadata=settings.keep_image_metadata,
    )
