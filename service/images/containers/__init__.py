"""Image files as containers: what they say of themselves, read without decoding a pixel.

Two things are done here before a codec sees a file, both by looking at its parts:

- **Claims are bounded.** Every format has a form that is cheap to send and dear to decode: a JPEG
  of hundreds of scans, a TIFF of a million strips that are one and the same, a hundred thousand
  comments. A file that claims more work than an ordinary one of `max_pixels` is refused.
- **What is no picture is taken out.** EXIF with positions, serial numbers and thumbnails, XMP,
  IPTC, comments, further pictures and whatever lies behind the end. Pixels decode as before, the
  orientation stays in force, and of a color profile stays what colors need. A file that has
  nothing of this stays as it is, byte for byte.

The parts that are kept are listed, not those that are dropped: what is unknown goes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from service.errors import ImageUndecodable
from service.images.containers import bmp, jpeg, png, tiff, webp

__all__ = ["plain"]

# By a file's first bytes, as `model.pictures` tells formats.
_FORMATS: Mapping[bytes, Callable[[bytes, int], bytes]] = {
    b"BM": bmp.plain,
    b"\xff\xd8\xff": jpeg.plain,
    b"\x89PNG\r\n\x1a\n": png.plain,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), tiff.plain),
    b"RIFF": webp.plain,
}


def plain(data: bytes, max_pixels: int) -> bytes:
    """A file without what is no picture → its bytes; `data` itself where nothing is taken out.

    A file of another format, or one that ends too early, stays as it is: decoding says so. Raises
    ImageTooComplex, ImageTooLarge, ImageMultiFrame, ImageTruncated or ImageUndecodable.
    """
    for start, of_format in _FORMATS.items():
        if data.startswith(start):
            try:
                found = of_format(data, max_pixels)
            except (struct.error, IndexError, ValueError) as error:
                raise ImageUndecodable(
                    "the image's headers contradict each other: it is damaged; save it again as "
                    "JPEG or PNG"
                ) from error
            return data if found == data else found
    return data
