"""Whether decoding and embedding work: a built-in image passes through both regularly."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Awaitable, Callable

import anyio
import numpy as np
from PIL import Image

from service.errors import NotReady, ServiceError
from service.images.decode import Picture

log = logging.getLogger(__name__)

EVERY = 5.0  # seconds between two checks
# Seconds that an image may take behind a full queue; after that something hangs.
_LATE = 60.0


class SelfCheck:
    """Embeds a built-in image regularly. Used on one event loop.

    embed: decodes and embeds a picture as that of a query.
    """

    def __init__(self, embed: Callable[[Picture], Awaitable[object]]) -> None:
        self._embed = embed
        self._picture = builtin_picture()
        self._started = anyio.Event()
        self._beat: float | None = None
        self._trouble: str | None = "no image has been embedded yet"

    async def first(self) -> None:
        """Wait for the first image, which also warms up the network, whether it fails or not."""
        await self._started.wait()

    async def run(self) -> None:
        """Embed the image every `EVERY` seconds until cancelled."""
        while True:
            await self.beat()
            self._started.set()
            await anyio.sleep(EVERY)

    async def beat(self) -> None:
        """Embed the built-in image once, and keep the result for `check`."""
        try:
            await self._embed(self._picture)
            trouble = None
        except ServiceError as error:
            trouble = error.detail
        if trouble is None:
            self._beat = time.monotonic()
        elif self._trouble is None:
            log.error("the built-in image cannot be embedded: %s", trouble)
        self._trouble = trouble

    def check(self) -> None:
        """Raise NotReady unless the last image was embedded, and not long ago."""
        if self._trouble is not None:
            raise NotReady(f"images cannot be embedded: {self._trouble}")
        assert self._beat is not None
        late = time.monotonic() - self._beat
        if late > _LATE:
            raise NotReady(
                f"the last image was embedded {late:.0f} seconds ago; decoding or the network hangs"
            )


def builtin_picture() -> Picture:
    """A smooth picture of 64×128 pixels."""
    x, y = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 128))
    pixels = np.stack([x, y, 1 - x], axis=2) * 255
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return Picture(buffer.getvalue(), modality="rgb")
