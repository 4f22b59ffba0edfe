"""TIFF and BigTIFF: the first directory, and its strips or tiles.

A file with anything else in it is written anew: header, directory, values, image data. Its byte
order and every value that pixels are computed from stay.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from service.errors import ImageTruncated, ImageUndecodable
from service.images.containers import jpeg
from service.images.containers.claims import (
    MOST_UNPACKED,
    check_parts,
    several_frames,
    too_complex,
)
from service.images.containers.color_profile import reduced_profile
from service.images.containers.orientation import UPRIGHT, orientation

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _ORIENTATION = 256, 257, 258, 259, 274
_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES = 273, 279, 324, 325
_JPEG_TABLES, _XMP, _PROFILE, _NO_DATA = 347, 700, 34675, 42113
_OLD_JPEG, _JPEG = 6, 7
_KEPT = {
    *(254, 255, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, 262, 263, 264, 265, 266, _STRIPS),
    *(_ORIENTATION, 277, 278, _STRIP_BYTES, 280, 281, 282, 283, 284, 290, 291, 292, 293, 296, 301),
    *(317, 318, 319, 320, 321, 322, 323, _TILES, _TILE_BYTES, 332, 334, 336, 338, 339, 340, 341),
    *(_JPEG_TABLES, 529, 530, 531, 532, _PROFILE, _NO_DATA),
}
_SHORT, _ASCII, _LONG, _UNDEFINED, _LONG8 = 3, 2, 4, 7, 16
_SIZES: Mapping[int, int] = {
    **{1: 1, _ASCII: 1, _SHORT: 2, _LONG: 4, 5: 8, 6: 1, _UNDEFINED: 1, 8: 2, 9: 4, 10: 8, 11: 4},
    **{12: 8, 13: 4, _LONG8: 8, 17: 8, 18: 8},
}
_INTEGERS: Mapping[int, str] = {1: "B", _SHORT: "H", _LONG: "I", 13: "I", _LONG8: "Q"}
# Tags that are text or bytes; anything else that claims to be is not what its tag says.
_OPAQUE = {_JPEG_TABLES, _PROFILE, _NO_DATA}
_MOST_TAGS = 1_000
_PADDING = 8  # bytes between two parts of a file that hide nothing

_Range = tuple[int, int]  # first byte, and the one after the last


class _Entry(NamedTuple):
    """A tag's type, the number of its values, and their bytes."""

    kind: int
    values: int
    data: bytes


@dataclass(frozen=True)
class _Layout:
    """Byte order and widths of a file."""

    order: str
    big: bool

    @property
    def offset(self) -> str:
        return "Q" if self.big else "I"

    @property
    def count(self) -> str:
        return "Q" if self.big else "H"

    @property
    def inline(self) -> int:
        """Bytes of values that fit into the directory."""
        return 8 if self.big else 4

    @property
    def header(self) -> int:
        return 16 if self.big else 8

    def pack(self, form: str, *values: object) -> bytes:
        return struct.pack(self.order + form, *values)

    def unpack(self, form: str, data: bytes, at: int = 0) -> tuple[int, ...]:
        return struct.unpack_from(self.order + form, data, at)

    def integers(self, entry: _Entry) -> list[int]:
        """The values of an entry. Raises ValueError where they are no integers."""
        if entry.kind not in _INTEGERS:
            raise ValueError("integers are wanted")
        return list(self.unpack(f"{entry.values}{_INTEGERS[entry.kind]}", entry.data))

    def entry(self, values: list[int]) -> _Entry:
        """Integers as an entry."""
        kind = _LONG8 if self.big else _LONG
        return _Entry(kind, len(values), self.pack(f"{len(values)}{self.offset}", *values))


def plain(data: bytes, max_pixels: int) -> bytes:
    """See `containers.plain`. A strip that is not in the file is ImageTruncated."""
    layout = _Layout("<" if data.startswith(b"II") else ">", 43 in data[2:4])
    tags, clean, used = _directory(data, layout)
    if _compression(tags, layout) == _OLD_JPEG:
        raise ImageUndecodable("old-style JPEG in TIFF is not supported; save it as JPEG or PNG")
    kept = {tag: entry for tag, entry in tags.items() if _is_kept(tag, entry)}
    clean &= kept.keys() == tags.keys()
    if _PROFILE in kept:
        profile = reduced_profile(kept[_PROFILE].data)
        clean &= profile == kept[_PROFILE].data
        if profile is None:
            del kept[_PROFILE]
        else:
            kept[_PROFILE] = _Entry(_UNDEFINED, len(profile), profile)
    if _ORIENTATION not in kept and _XMP in tags:
        turn = orientation(None, tags[_XMP].data)
        if turn != UPRIGHT:
            kept[_ORIENTATION] = _Entry(_SHORT, 1, layout.pack("H", turn))
    where = _TILES if _TILES in kept else _STRIPS
    if where not in kept or (_TILES in kept and _STRIPS in kept):
        raise ValueError("strips or tiles are wanted")
    ranges = _ranges(data, kept, layout, where)
    pieces = [data[first:last] for first, last in ranges]
    if _compression(tags, layout) == _JPEG:
        pieces, tables = _plain_jpegs(pieces, kept.get(_JPEG_TABLES), max_pixels)
        clean &= [len(piece) for piece in pieces] == [last - first for first, last in ranges]
        if tables is not None:
            clean &= tables == kept[_JPEG_TABLES]
            kept[_JPEG_TABLES] = tables
    if clean and _covers(data, [*used, *ranges]):
        return data
    return _written(layout, kept, where, pieces)


def _directory(data: bytes, layout: _Layout) -> tuple[dict[int, _Entry], bool, list[_Range]]:
    """The first directory's entries, whether all of it is understood, and what it occupies.

    The first entry of a tag counts. Raises ImageTruncated, ImageTooComplex, ImageMultiFrame.
    """
    (start,) = layout.unpack(layout.offset, data, layout.header // 2)
    width = struct.calcsize(layout.count)
    if start + width > len(data):
        raise _cut()
    (count,) = layout.unpack(layout.count, data, start)
    if count > _MOST_TAGS:
        raise too_complex(f"more than {_MOST_TAGS:,} tags")
    form = f"HH{layout.offset}"
    size = struct.calcsize(f"<{form}") + layout.inline
    end = start + width + count * size
    if end + layout.inline > len(data):
        raise _cut()
    tags: dict[int, _Entry] = {}
    used = [(0, layout.header), (start, end + layout.inline)]
    clean = True
    before = 0
    for position in range(start + width, end, size):
        tag, kind, number = layout.unpack(form, data, position)
        value = position + size - layout.inline
        length = _SIZES.get(kind, 0) * number
        if length > layout.inline:
            (value,) = layout.unpack(layout.offset, data, value)
            used.append((value, value + length))
        if length > MOST_UNPACKED and tag in _KEPT and tag != _PROFILE:
            raise too_complex("tags of more than a megabyte")
        body = data[value : value + length] if length <= MOST_UNPACKED else b""
        clean &= before < tag
        before = tag
        if length and len(body) == length:
            tags.setdefault(tag, _Entry(kind, number, body))
        else:
            clean = False
    (further,) = layout.unpack(layout.offset, data, end)
    if further not in (0, start):
        raise several_frames()
    return tags, clean and not further, used


def _compression(tags: Mapping[int, _Entry], layout: _Layout) -> int:
    return layout.integers(tags[_COMPRESSION])[0] if _COMPRESSION in tags else 1


def _is_kept(tag: int, entry: _Entry) -> bool:
    if tag == _NO_DATA:  # written as text
        return _is_number(entry.data)
    return tag in _KEPT and (tag in _OPAQUE or entry.kind not in (_ASCII, _UNDEFINED))


def _is_number(text: bytes) -> bool:
    try:
        float(text.rstrip(b"\0"))
    except ValueError:
        return False
    return True


def _ranges(data: bytes, kept: Mapping[int, _Entry], layout: _Layout, where: int) -> list[_Range]:
    """Where the strips or tiles lie. Raises ImageTruncated or ImageTooComplex."""
    offsets = layout.integers(kept[where])
    check_parts(len(offsets))
    counts_tag = _TILE_BYTES if where == _TILES else _STRIP_BYTES
    counts = layout.integers(kept[counts_tag]) if counts_tag in kept else []
    counts += [0] * (len(offsets) - len(counts))
    ordered = sorted({*offsets, len(data)})
    following = dict(pairwise(ordered))
    ranges = []
    for first, count in zip(offsets, counts, strict=False):
        # Without a length: up to the next one. Offset 0 stands for a part that is left out.
        last = first + count if count else following.get(first, first)
        ranges.append((first, last) if first else (0, 0))
    if len(ranges) == 1 and ranges[0][0] < len(data):
        # A single strip's length is often wrong, and decoders know where it ends.
        ranges = [(ranges[0][0], min(ranges[0][1], len(data)))]
    if any(last > len(data) or first >= len(data) for first, last in ranges):
        raise _cut()
    if sum(last - first for first, last in ranges) > 2 * len(data):
        raise too_complex("many parts that are the same bytes")
    return ranges


def _plain_jpegs(
    pieces: list[bytes], tables: _Entry | None, max_pixels: int
) -> tuple[list[bytes], _Entry | None]:
    """Strips that are JPEGs, and the tables they share, without what is no picture."""
    found, visits = [], 0
    for piece in pieces:
        stripped, visited = jpeg.stripped(piece, max_pixels) if piece else (piece, 0)
        visits += visited
        jpeg.check_visits(visits, max_pixels)
        found.append(stripped)
    if tables is not None:
        stripped, _ = jpeg.stripped(tables.data, max_pixels)
        tables = _Entry(tables.kind, len(stripped), stripped)
    return found, tables


def _covers(data: bytes, ranges: list[_Range]) -> bool:
    """Whether these are the whole file, but for padding."""
    reached = 0
    for first, last in sorted(ranges):
        if first - reached > _PADDING:
            return False
        reached = max(reached, last)
    return len(data) - reached <= _PADDING


def _written(layout: _Layout, kept: dict[int, _Entry], where: int, pieces: list[bytes]) -> bytes:
    """A file of these tags and strips or tiles."""
    counts_tag = _TILE_BYTES if where == _TILES else _STRIP_BYTES
    kept[counts_tag] = layout.entry([len(piece) for piece in pieces])
    kept[where] = layout.entry([0] * len(pieces))
    # Directory, then values that do not fit into it, then strips, each at an even place.
    position = layout.header + struct.calcsize(layout.count) + layout.inline
    position += len(kept) * (4 + 2 * layout.inline)
    places: dict[int, int] = {}
    for tag, entry in kept.items():
        if len(entry.data) > layout.inline:
            places[tag] = position
            position += len(entry.data) + (-len(entry.data) % layout.inline)
    offsets = []
    for piece in pieces:
        offsets.append(position if piece else 0)
        position += len(piece) + (len(piece) & 1)
    kept[where] = layout.entry(offsets)
    version = layout.pack("HHHQ", 43, 8, 0, 16) if layout.big else layout.pack("HI", 42, 8)
    out = [b"II" if layout.order == "<" else b"MM", version, layout.pack(layout.count, len(kept))]
    for tag, entry in sorted(kept.items()):
        inline = (
            layout.pack(layout.offset, places[tag])
            if tag in places
            else entry.data.ljust(layout.inline, b"\0")
        )
        out.append(layout.pack(f"HH{layout.offset}", tag, entry.kind, entry.values) + inline)
    out.append(bytes(layout.inline))
    out += [kept[tag].data + bytes(-len(kept[tag].data) % layout.inline) for tag in places]
    out += [piece + bytes(len(piece) & 1) for piece in pieces]
    return b"".join(out)


def _cut() -> ImageTruncated:
    return ImageTruncated("the image ends too early; send the whole file")
