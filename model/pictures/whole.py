"""Whether all pixels of a file are in it.

Codecs fill up what is missing, each in its way: libjpeg answers a file that was cut and got an
end marker with gray, a PNG whose rows end early is black below, a strip of a TIFF that is too short
goes on with what lies behind it. Two ways tell such files: what the headers say, which is read
first, and decoding a second time, with other bytes where data may be missing (JPEG) or on another
ground (PNG). A pixel that differs was not in the file.

A JPEG without an end marker counts as cut, whatever follows: nothing says where its data end.
Bytes behind an end marker are no part of the picture; cameras put other things there.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from PIL import Image, ImageChops, TiffImagePlugin

from model.pictures.errors import truncated

# Between segments, and in entropy-coded data where 0xFF 0x00 is a byte of the data.
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE, _ARITHMETIC = {0xC2, 0xCA}, {0xC9, 0xCA}
# Where entropy-coded data should be over: random bits, which decode to anything but the filler.
_MORE = bytes(Random(1).choices(range(255), k=64))
# From here on a second look costs more than a few milliseconds, and it is taken on suspicion only.
_LARGE = 1_000_000
_FILLER = 128  # of libjpeg, for blocks that are not there
_GROUNDS = (85, 170)

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _STRIPS, _STRIP_BYTES = 256, 257, 258, 259, 273, 279
_TILES, _TILE_BYTES, _JPEG_TABLES, _PLAIN, _JPEG = 324, 325, 347, 1, 7


def check_file(data: bytes, kind: str) -> None:
    """Look at the file's own structure, before it is opened. Raises PictureError."""
    if kind == "JPEG" and not _Jpeg(data).whole:
        raise truncated()
    if kind == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise truncated()
    if kind == "TIFF" and data[2:4] in (b"*\0", b"\0*"):
        order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
        first = int.from_bytes(data[4:8], order)
        entries = int.from_bytes(data[first : first + 2], order)
        if len(data) < first + 2 + 12 * entries:
            raise truncated()


def loaded(opened: Callable[[], Image.Image], data: bytes) -> Image.Image:
    """Open and decode an image of these bytes. Raises PictureError where pixels are missing."""
    image = opened()
    if image.format == "PNG":
        return _loaded_png(image, opened)
    if image.format == "WEBP":
        return _loaded_webp(image, data)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_strips(image, data)
    image.load()
    if image.format in ("JPEG", "MPO"):
        _check_pixels(image, _Jpeg(data))
    return image


@dataclass
class _Jpeg:
    """The markers of a JPEG.

    end: of the end marker, None where there is none. ends: where the entropy-coded data of each
    scan end. missing: by component, a bit for each coefficient that no scan holds to the last bit.
    """

    data: bytes
    end: int | None = None
    ends: list[int] = field(default_factory=list)
    missing: dict[int, int] = field(default_factory=dict)
    frame: int = 0

    def __post_init__(self) -> None:
        position, in_scan = 2, False
        while (found := _MARKER.search(self.data, position)) is not None:
            marker, position = found[1][0], found.end()
            if marker in _RESTARTS or marker in (_SOI, _TEM):
                continue
            if in_scan:
                self.ends.append(found.start())
            if marker == _EOI:
                self.end = position
                return
            length = int.from_bytes(self.data[position : position + 2], "big")
            segment = self.data[position + 2 : position + length]
            position += max(length, 2)
            in_scan = marker == _SOS
            if in_scan:
                self._scan(segment)
            elif marker in _FRAMES:
                self.frame = marker
                self.missing = dict.fromkeys(segment[6::3], (1 << 64) - 1)

    def _scan(self, header: bytes) -> None:
        count = header[0] if header else 0
        components, rest = header[1 : 1 + 2 * count : 2], header[1 + 2 * count :]
        first, last, bits = 0, 63, 0
        if self.frame in _PROGRESSIVE and len(rest) >= 3:
            first, last, bits = rest[0], rest[1], rest[2] & 15
        if bits == 0:
            held = (1 << (last + 1)) - (1 << first) if first <= last else 0
            for component in components:
                self.missing[component] = self.missing.get(component, 0) & ~held

    @property
    def whole(self) -> bool:
        """Whether there is an end marker, and all scans begin before it."""
        return self.end is not None and not any(self.missing.values())

    def with_more(self) -> bytes:
        """The same file with more bytes where the data of each scan end."""
        pieces, begin = [], 0
        for end in self.ends:
            pieces += [self.data[begin:end], _MORE]
            begin = end
        return b"".join([*pieces, self.data[begin : self.end]])


def _check_pixels(image: Image.Image, jpeg: _Jpeg) -> None:
    """Compare a decoded JPEG with what it is with more data. Raises PictureError."""
    if jpeg.frame in _ARITHMETIC:  # whose data may end early: zeros follow by definition
        return
    if image.width * image.height > _LARGE and len(jpeg.ends) == 1 and image.mode in ("L", "RGB"):
        # The blocks of a single scan come in order: the last one is missing if any is.
        last = image.getpixel((image.width - 1, image.height - 1))
        if last not in (_FILLER, (_FILLER,) * 3):
            return
    again = Image.open(io.BytesIO(jpeg.with_more()), formats=["JPEG"])
    if ImageChops.difference(again, image).getbbox() is not None:
        raise truncated()


def _loaded_png(image: Image.Image, opened: Callable[[], Image.Image]) -> Image.Image:
    one, other = _GROUNDS if image.mode != "1" else (0, 255)
    ground = _load_on(image, one)
    # The last row to be decoded is one of the lowest two, interlaced or not.
    lowest = image.crop((0, max(0, image.height - 2), image.width, image.height))
    if ground in set(lowest.get_flattened_data()):
        again = opened()
        _load_on(again, other)
        if again.tobytes() != image.tobytes():
            raise truncated()
    return image


def _load_on(image: Image.Image, ground: int) -> object:
    """Decode over pixels that have a value already → that value."""
    bands = len(image.getbands())
    empty = Image.new(image.mode, image.size, ground if bands == 1 else (ground,) * bands)
    image.im = empty.im
    pixel = empty.getpixel((0, 0))
    image.load()
    return pixel


def _loaded_webp(image: Image.Image, data: bytes) -> Image.Image:
    """libwebp refuses what is missing; where it would decode with more data, it was cut."""
    try:
        image.load()
    except OSError:
        if data[12:16] not in (b"VP8 ", b"VP8L"):
            raise
        more = data[20:] + bytes(4 * image.width * image.height)
        chunk = data[12:16] + struct.pack("<I", len(more)) + more
        longer = b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
        Image.open(io.BytesIO(longer), formats=["WEBP"]).load()
        raise truncated() from None
    return image


def _check_strips(image: TiffImagePlugin.TiffImageFile, data: bytes) -> None:
    """Raise PictureError where strips or tiles lie outside the file, or are too short."""
    tags = image.tag_v2
    offsets = tags.get(_STRIPS, tags.get(_TILES, ()))
    sizes = tags.get(_STRIP_BYTES, tags.get(_TILE_BYTES, ()))
    if any(offset + size > len(data) for offset, size in zip(offsets, sizes, strict=False)):
        raise truncated()
    compression = tags.get(_COMPRESSION, _PLAIN)
    if compression == _PLAIN and sizes:
        row = (tags[_WIDTH] * sum(tags.get(_BITS, (1,))) + 7) // 8
        if sum(sizes) < row * tags[_LENGTH]:
            raise truncated()
    if compression == _JPEG:
        tables = tags.get(_JPEG_TABLES, b"\xff\xd8\xff\xd9")[:-2]
        for offset, size in zip(offsets, sizes, strict=False):
            strip = _Jpeg(tables + data[offset + 2 : offset + size])
            if not strip.whole:
                raise truncated()
            _check_pixels(Image.open(io.BytesIO(strip.data), formats=["JPEG"]), strip)
