"""PNG: chunks up to IEND."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

from service.images.containers.claims import MOST_UNPACKED, check_parts, several_frames
from service.images.containers.color_profile import reduced_profile
from service.images.containers.orientation import UPRIGHT, bare_exif, is_bare, orientation

_SIGNATURE = 8
_KEPT = {
    *(b"IHDR", b"PLTE", b"tRNS", b"IDAT"),
    *(b"cICP", b"cHRM", b"gAMA", b"sRGB", b"sBIT", b"mDCV", b"cLLI", b"bKGD", b"pHYs"),
}
_PROFILE_NAME = b"icc"  # the chunk must have one, and a real one may name a device or its owner
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_XMP, _RAW_EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"


def plain(data: bytes, max_pixels: int) -> bytes:
    """See `containers.plain`."""
    pieces = [data[:_SIGNATURE]]
    exif: bytes | None = None
    texts: dict[bytes, bytes] = {}
    exif_at: int | None = None
    profiled = False
    for count, (kind, body, whole) in enumerate(_chunks(data)):
        check_parts(count)
        if kind == b"fdAT" or (kind == b"acTL" and int.from_bytes(body[:4], "big") > 1):
            raise several_frames()
        if kind == b"IDAT" and exif_at is None:
            exif_at = len(pieces)
            pieces.append(b"")
        if kind in _KEPT:
            pieces.append(whole)
        elif kind == b"IEND":
            pieces.append(whole if not body else _chunk(b"IEND", b""))
            break
        elif kind == b"iCCP" and not profiled:  # unpacking each of many would be dear
            profiled = True
            pieces.append(_profile(body, whole))
        elif kind == b"eXIf":
            exif = body
        elif kind in _TEXTS:
            name, _, text = body.partition(b"\0")
            if name in (_XMP, _RAW_EXIF):
                texts[name] = _text(kind, text)
    if exif is None and _RAW_EXIF in texts:
        with suppress(ValueError):
            exif = bytes.fromhex("".join(texts[_RAW_EXIF].decode("latin-1").split("\n")[3:]))
    turn = orientation(exif, texts.get(_XMP))
    if exif_at is not None and turn != UPRIGHT:
        pieces[exif_at] = _chunk(b"eXIf", exif if exif and is_bare(exif) else bare_exif(turn))
    return b"".join(pieces)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Type, body, and the whole chunk as it is in the file; the last one may be cut."""
    position = _SIGNATURE
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        yield kind, data[position + 8 : end - 4], data[position:end]
        position = end


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _profile(body: bytes, whole: bytes) -> bytes:
    """What is left of an iCCP chunk."""
    name, _, packed = body.partition(b"\0")
    profile = _unpacked(packed[1:])
    reduced = reduced_profile(profile)
    if reduced == profile and name == _PROFILE_NAME:
        return whole
    if reduced is None:
        return b""
    return _chunk(b"iCCP", _PROFILE_NAME + b"\0\0" + zlib.compress(reduced))


def _text(kind: bytes, text: bytes) -> bytes:
    """The text of a text chunk after its keyword; empty where it cannot be read."""
    if kind == b"tEXt":
        return text
    if kind == b"zTXt":
        return _unpacked(text[1:])
    packed, rest = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    return _unpacked(rest) if packed else rest


def _unpacked(packed: bytes) -> bytes:
    with suppress(zlib.error):
        return zlib.decompressobj().decompress(packed, MOST_UNPACKED)
    return b""
