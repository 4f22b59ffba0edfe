"""What a service begins before it imports torch, so that both go on at the same time.

Loads no torch itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

from service.embedding.verdict import Ahead, ahead
from service.images.decode import ImageLimits
from service.images.pool import Decoders
from service.settings import Settings


class Begun(NamedTuple):
    """Processes that decode, and the network where an earlier start has chosen one.

    requests: those of requests. checks: that of the self-check, which thus never waits behind
    uploads. network: None where none is looked for.
    """

    requests: Decoders
    checks: Decoders
    network: Ahead | None


@contextmanager
def begun(settings: Settings, *, network: bool = True) -> Iterator[Begun]:
    """Begin as the settings say, and end it with the block.

    network: whether this process embeds. Raises RuntimeUnavailable.
    """
    with ExitStack() as stack:
        requests = stack.enter_context(closing(_decoders(settings, settings.decode_processes)))
        checks = stack.enter_context(closing(_decoders(settings, 1)))
        found = None
        if network and settings.runtime != "torch" and not settings.device.startswith("cuda"):
            cache = settings.data_dir / "cache"
            found = stack.enter_context(ahead(settings.checkpoint, settings.runtime, cache))
        yield Begun(requests, checks, found)


def _decoders(settings: Settings, processes: int) -> Decoders:
    return Decoders(
        processes,
        ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
        seconds=settings.decode_timeout,
        keep_metadata=settings.keep_image_metadata,
    )
