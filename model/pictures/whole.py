"""Whether all pixels of a file are in it.

Codecs fill up what is missing, each in its way: libjpeg answers a file that was cut and got an
end marker with gray, a PNG whose rows end early is black below, a strip of a TIFF that is too short
goes on with what lies behind it. Two ways tell such files: what the headers say, which is read
first, and decoding a second time, with other bytes where data may be missing (JPEG) or on another
ground (PNG). A pixel that differs was not in the file. Of most JPEGs less tells that nothing is
missing: `_surely_whole`.

A JPEG without an end marker counts as cut, whatever follows: nothing says where its data end.
Bytes behind an end marker are no part of the picture; cameras put other things there.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Literal

from PIL import Image, ImageChops, TiffImagePlugin

from model.pictures.errors import truncated

# Between segments, and in entropy-coded data where 0xFF 0x00 is a byte of the data.
_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE, _ARITHMETIC = {0xC0, 0xC1}, {0xC2, 0xCA}, {0xC9, 0xCA}
# Where entropy-coded data should be over: random bits, which decode to anything but the filler. The
# first one is set: libjpeg goes on with zeros.
_MORE = b"\xd7" + bytes(Random(1).choices(range(255), k=63))
# From here on a second look costs more than a few milliseconds, and it is taken on suspicion only.
_LARGE = 1_000_000
_FILLER = (128, (128, 128, 128))  # of libjpeg, for blocks that are not there
_BLOCK, _HIGHEST = 8, 65_500  # pixels: of a block, and of a JPEG that libjpeg decodes
_GROUNDS = (85, 170)

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _STRIPS, _STRIP_BYTES = 256, 257, 258, 259, 273, 279
_TILES, _TILE_BYTES, _JPEG_TABLES, _PLAIN, _JPEG = 324, 325, 347, 1, 7


@dataclass(frozen=True)
class File:
    """An image's bytes and their format."""

    data: bytes
    kind: str

    @cached_property
    def jpeg(self) -> _Jpeg:
        """Its markers, read once."""
        return _Jpeg(self.data)


def check_file(file: File) -> None:
    """Look at the file's own structure, before it is opened. Raises PictureError."""
    data, kind = file.data, file.kind
    if kind == "JPEG" and not file.jpeg.whole:
        raise truncated()
    if kind == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise truncated()
    if kind == "TIFF" and data[2:4] in (b"*\0", b"\0*"):
        order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
        first = int.from_bytes(data[4:8], order)
        entries = int.from_bytes(data[first : first + 2], order)
        if len(data) < first + 2 + 12 * entries:
            raise truncated()


def loaded(opened: Callable[[], Image.Image], file: File) -> Image.Image:
    """Open and decode an image of this file. Raises PictureError where pixels are missing."""
    image = opened()
    if image.format == "PNG":
        return _loaded_png(image, opened)
    if image.format == "WEBP":
        return _loaded_webp(image, file.data)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_strips(image, file.data)
    image.load()
    if image.format in ("JPEG", "MPO"):
        _check_pixels(image, file.jpeg)
    return image


@dataclass
class _Jpeg:
    """The markers of a JPEG.

    end: of the end marker, None where there is none. ends: where the entropy-coded data of each
    scan end, with the number of the restart marker that would be next. missing: by component, a bit
    for each coefficient that no scan holds to the last bit. frame: its kind. height_at: where the
    frame says its height. across: the components of the last scan. down: blocks of a component
    below each other where it has most.
    """

    data: bytes
    end: int | None = None
    ends: dict[int, int] = field(default_factory=dict)
    missing: dict[int, int] = field(default_factory=dict)
    frame: int = 0
    height_at: int = 0
    across: int = 0
    down: int = 1

    def __post_init__(self) -> None:
        position, in_scan, restart = 2, False, 0
        while (found := _MARKER.search(self.data, position)) is not None:
            marker, position = found[1][0], found.end()
            if marker in _RESTARTS:
                restart = (marker + 1) % 8
            if marker in _RESTARTS or marker in (_SOI, _TEM):
                continue
            if in_scan:
                self.ends[found.start()] = restart
            if marker == _EOI:
                self.end = position
                return
            length = int.from_bytes(self.data[position : position + 2], "big")
            segment = self.data[position + 2 : position + length]
            position += max(length, 2)
            in_scan, restart = marker == _SOS, 0
            if in_scan:
                self._scan(segment)
            elif marker in _FRAMES:
                self.frame, self.height_at = marker, found.end() + 3
                self.missing = dict.fromkeys(segment[6::3], (1 << 64) - 1)
                self.down = max((sampling & 15 for sampling in segment[7::3]), default=1) or 1

    def _scan(self, header: bytes) -> None:
        self.across = count = header[0] if header else 0
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
        for end, restart in self.ends.items():
            pieces += [self.data[begin:end], _MORE, bytes([0xFF, _RESTARTS[restart]]), _MORE]
            begin = end
        return b"".join([*pieces, self.data[begin : self.end]])

    @property
    def at_once(self) -> bool:
        """Whether a decoder takes all of each block from one scan, block after block."""
        sequential = self.frame in _SEQUENTIAL and len(self.ends) == 1
        return sequential and self.across == len(self.missing)

    def with_height(self, height: int) -> bytes:
        """The same file, said to be of another height."""
        before, behind = self.data[: self.height_at], self.data[self.height_at + 2 : self.end]
        return before + height.to_bytes(2, "big") + behind


def _check_pixels(image: Image.Image, jpeg: _Jpeg) -> None:
    """Compare a decoded JPEG with what it is with more data. Raises PictureError."""
    if jpeg.frame in _ARITHMETIC:  # whose data may end early: zeros follow by definition
        return
    if image.mode in ("L", "RGB"):
        if image.width * image.height > _LARGE and len(jpeg.ends) == 1:
            # The blocks of a single scan come in order: the last one is missing if any is.
            if image.getpixel((image.width - 1, image.height - 1)) not in _FILLER:
                return
        elif jpeg.at_once and _surely_whole(image, jpeg):
            return
    again = Image.open(io.BytesIO(jpeg.with_more()), formats=["JPEG"])
    if ImageChops.difference(again, image).getbbox() is not None:
        raise truncated()


def _surely_whole(image: Image.Image, jpeg: _Jpeg) -> bool:
    """Whether it shows at little cost that there are data for all blocks. False: perhaps not.

    Behind the block in which data end, libjpeg fills all with gray. A file that is said to have one
    row of blocks more, and where that row does not begin with gray, thus has all rows before it. An
    eighth of the size, one pixel of each block, is enough to see it.
    """
    step = _BLOCK * jpeg.down
    row = -(-image.height // step)
    height = (row + 1) * step
    if image.width < _BLOCK or height > _HIGHEST:
        return False
    higher = Image.open(io.BytesIO(jpeg.with_height(height)), formats=["JPEG"])
    higher.draft(None, (image.width // _BLOCK, height // _BLOCK))
    return higher.getpixel((0, row * jpeg.down)) not in _FILLER


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
