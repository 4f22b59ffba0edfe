"""Small JPEGs of stored crops, for lists of many."""

from __future__ import annotations

import asyncio
import io

from anyio import to_thread
from PIL import Image

from model.pixels import Pixels
from service.gallery import Item
from service.images.decode import Picture
from service.pipeline.pipeline import Pipeline

_WIDEST = 2048  # pixels: a crop may be a strip
_QUALITY = 85


async def thumbnail(pipeline: Pipeline, item: Item, crop: bytes, height: int, actor: str) -> bytes:
    """`crop`, the stored one of `item`, as a JPEG of `height` pixels, with the crop's aspect.

    Less high only where it would be wider than 2,048 pixels. Colours are the crop's own, those of
    16 bits stretched as everywhere; infrared of inverted polarity stays as its camera shows it.
    Raises ServiceError.
    """
    scale = min(height / item.height, _WIDEST / item.width)
    size = max(1, round(scale * item.height)), max(1, round(scale * item.width))
    # As a visible picture: turned to gray and right polarity it would no longer be what it shows.
    decoded = await asyncio.wrap_future(
        pipeline.submit_stored(Picture(crop, "rgb"), *size, pipeline.share(actor))
    )
    return await to_thread.run_sync(_jpeg, decoded.image)


def _jpeg(pixels: Pixels) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
