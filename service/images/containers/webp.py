"""WebP: the chunks of a RIFF file."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from service.images.containers.claims import check_parts, check_pixels, several_frames
from service.images.containers.color_profile import reduced_profile
from service.images.containers.orientation import UPRIGHT, bare_exif, is_bare, orientation

_HEADER = 12
_PICTURE = {b"VP8 ", b"VP8L", b"ALPH"}
_FRAME_HEADER = 16
_HAS_PROFILE, _HAS_EXIF, _HAS_XMP = 0x20, 0x08, 0x04


def plain(data: bytes, max_pixels: int) -> bytes:
    """See `containers.plain`."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data) or data[8:12] != b"WEBP":
        return data  # cut, or no WebP: decoding says so
    first, body = next(_chunks(data, _HEADER, end), (b"", b""))
    check_pixels(*size(first, body), max_pixels)
    if first != b"VP8X":  # anything else in the file belongs to the extended format
        return _riff([(first, body)])
    kept = [(first, body)]
    profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    frames = 0
    for count, (kind, part) in enumerate(_chunks(data, _HEADER, end)):
        check_parts(count)
        if kind in _PICTURE or kind == b"ANIM":
            kept.append((kind, part))
        elif kind == b"ANMF":
            frames += 1
            if frames > 1:
                raise several_frames()
            kept.append((kind, _frame(part)))
        elif kind == b"ICCP" and profile is None:
            profile = reduced_profile(part)
            kept += [] if profile is None else [(kind, profile)]
        elif kind == b"EXIF" and exif is None:
            exif = part
        elif kind == b"XMP " and xmp is None:
            xmp = part
    turn = orientation(exif, xmp)
    if turn != UPRIGHT:
        kept.append((b"EXIF", exif if exif and is_bare(exif) else bare_exif(turn)))
    flags = body[0] & ~(_HAS_PROFILE | _HAS_EXIF | _HAS_XMP)
    flags |= _HAS_PROFILE * (profile is not None) | _HAS_EXIF * (turn != UPRIGHT)
    kept[0] = (first, bytes([flags]) + body[1:])
    return _riff(kept)


def _chunks(data: bytes, position: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, position)
        yield kind, data[position + 8 : min(position + 8 + length, end)]
        position += 8 + length + (length & 1)


def _frame(body: bytes) -> bytes:
    """The one frame of an animation, without what is no picture in it."""
    inner = _chunks(body, _FRAME_HEADER, len(body))
    return body[:_FRAME_HEADER] + _written([(k, part) for k, part in inner if k in _PICTURE])


def size(kind: bytes, body: bytes) -> tuple[int, int]:
    """Width and height that the first chunk says; 0, 0 where it is none of a picture."""
    if kind == b"VP8X":
        return (
            int.from_bytes(body[4:7], "little") + 1,
            int.from_bytes(body[7:10], "little") + 1,
        )
    if kind == b"VP8 " and len(body) >= 10:
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return 0, 0


def _riff(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = _written(chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _written(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(
        kind + struct.pack("<I", len(body)) + body + bytes(len(body) & 1) for kind, body in chunks
    )
