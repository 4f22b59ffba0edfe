"""Which way up a picture is, from its EXIF or XMP; and EXIF that says nothing else."""

from __future__ import annotations

import re
import struct
import warnings

from PIL import ExifTags, Image

_PREFIX = b"Exif\0\0"
_LONGEST = 1 << 20  # of EXIF that is looked at; JPEG allows 64 KB
_ONE_ENTRY = 26  # bytes of a TIFF header and a directory of one entry
UPRIGHT = 1
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """1 to 8 as EXIF numbers them; 1 where nothing, or nothing readable, is said.

    exif: with or without its prefix. EXIF wins over XMP.
    """
    if exif:
        tags = Image.Exif()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tags.load(exif[:_LONGEST])
            found = tags.get(ExifTags.Base.Orientation)
        except Exception:  # broken EXIF says nothing about the pixels
            found = None
        if found is not None:
            return found if isinstance(found, int) and 1 <= found <= 8 else UPRIGHT
    if xmp and (match := _IN_XMP.search(xmp)):
        return int(match[1])
    return UPRIGHT


def bare_exif(turn: int) -> bytes:
    """EXIF, without its prefix, that says this orientation and nothing else."""
    entry = struct.pack(">HHIHH", ExifTags.Base.Orientation, 3, 1, turn, 0)
    return struct.pack(">2sHIH", b"MM", 42, 8, 1) + entry + bytes(4)


def is_bare(exif: bytes) -> bool:
    """Whether EXIF says the orientation only, in whatever byte order."""
    body = exif.removeprefix(_PREFIX)
    if len(body) != _ONE_ENTRY or body[:4] not in (b"MM\0*", b"II*\0"):
        return False
    order = ">" if body.startswith(b"MM") else "<"
    start, count, tag, kind, values = struct.unpack(f"{order}4xIHHHI", body[:18])
    return (start, count, tag, kind, values) == (8, 1, ExifTags.Base.Orientation, 3, 1)
