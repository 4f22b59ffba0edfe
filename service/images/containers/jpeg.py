"""JPEG: segments up to the end marker."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from service.images.containers.claims import too_complex
from service.images.containers.color_profile import reduced_profile
from service.images.containers.orientation import UPRIGHT, bare_exif, is_bare, orientation

_SOI, _EOI, _SOS, _COM, _APP0, _APP1, _APP2, _APP14 = 0xD8, 0xD9, 0xDA, 0xFE, 0xE0, 0xE1, 0xE2, 0xEE
_ALONE = {0x01, _SOI, *range(0xD0, 0xD8)}  # markers without a segment
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xCA}
_NEXT = re.compile(rb"\xff+([^\x00\xff])")
# In a scan 0xFF 0x00 is data, and restart markers belong to it.
_AFTER_SCAN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")

_JFIF, _EXIF, _XMP, _ICC = (
    b"JFIF\0",
    b"Exif\0\0",
    b"http://ns.adobe.com/xap/1.0/\0",
    b"ICC_PROFILE\0",
)
_SEGMENT = 65_533 - len(_ICC) - 2  # bytes of a profile in one segment

_MOST_SEGMENTS = 2_000
# Encoders write about ten scans, and those that try for the smallest file some twenty.
_MOST_SCANS = 100
# Coefficients that all scans together visit, for each pixel that is allowed: an ordinary
# progressive file of four full components visits 15.
_VISITS = 16
_BLOCK, _BLOCK_COST = 64, 8  # coefficients; and what a block costs besides, in coefficients


def plain(data: bytes, max_pixels: int) -> bytes:
    """See `containers.plain`."""
    found, visits = stripped(data, max_pixels)
    check_visits(visits, max_pixels)
    return found if b"\xff\xda" in found else data  # no scan, no JPEG: decoding says so


def check_visits(visits: int, max_pixels: int) -> None:
    """Raises ImageTooComplex."""
    if visits > _VISITS * max_pixels:
        raise too_complex("scans that take far longer to decode than its pixels should")


def stripped(data: bytes, max_pixels: int) -> tuple[bytes, int]:
    """One JPEG stream → the stream without what is no picture, and the coefficients it visits.

    A picture of more than `max_pixels` is refused by its size later, so its visits are not counted.
    Raises ImageTooComplex for too many segments or scans.
    """
    walk = _Walk(data, max_pixels)
    walk.run()
    return b"".join(walk.pieces), walk.visits


@dataclass
class _Walk:
    data: bytes
    max_pixels: int
    pieces: list[bytes] = field(default_factory=lambda: [b"\xff\xd8"])
    visits: int = 0
    scans: int = 0
    progressive: bool = False
    blocks: dict[int, int] = field(default_factory=dict)
    """Of each component."""
    exif: dict[int, bytes] = field(default_factory=dict)
    """Place in `pieces` → EXIF without its prefix; what is left of it is decided at the end."""
    icc: dict[int, bytes] = field(default_factory=dict)
    """Place in `pieces` → number, count and a part of the profile."""
    xmp: bytes | None = None
    turned_at: int | None = None

    def run(self) -> None:
        position, segments = 2, 0
        scanning = False
        while found := (_AFTER_SCAN if scanning else _NEXT).search(self.data, position):
            if scanning:
                self.pieces.append(self.data[position : found.start()])
            marker, position = found[1][0], found.end()
            if marker == _EOI:
                self.pieces.append(found[0])
                break
            if marker in _ALONE:
                self.pieces.append(found[0])
                continue
            segments += 1
            if segments > _MOST_SEGMENTS:
                raise too_complex(f"more than {_MOST_SEGMENTS:,} segments")
            length = int.from_bytes(self.data[position : position + 2], "big")
            body = self.data[position + 2 : position + length]
            position += max(length, 2)
            self._segment(marker, body, self.data[found.start() : position])
            scanning = marker == _SOS
        else:
            if scanning:  # cut: decoding says so
                self.pieces.append(self.data[position:])
        self._rewrite_exif()
        self._rewrite_profile()

    def _segment(self, marker: int, body: bytes, whole: bytes) -> None:
        if marker in _FRAMES:
            self._frame(marker, body)
        elif marker == _SOS:
            self._scan(body)
        elif marker == _APP0:
            if not body.startswith(_JFIF):
                whole = b""
            elif body[12:] not in (b"", b"\0\0"):
                whole = _segment(_APP0, body[:12] + b"\0\0")  # without its thumbnail
        elif marker == _APP1:
            self._app1(body)
            whole = whole if body.startswith(_EXIF) else b""
        elif marker == _APP2 and body.startswith(_ICC):
            self.icc[len(self.pieces)] = body[len(_ICC) :]
        elif marker == _APP14 and body.startswith(b"Adobe"):
            whole = whole if len(body) <= 12 else _segment(_APP14, body[:12])
        elif marker == _COM or 0xE0 <= marker <= 0xEF:
            whole = b""
        self.pieces.append(whole)

    def _app1(self, body: bytes) -> None:
        if body.startswith(_EXIF):
            self.exif[len(self.pieces)] = body[len(_EXIF) :]
        elif body.startswith(_XMP):
            self.xmp = body[len(_XMP) :]
        else:
            return
        if self.turned_at is None:
            self.turned_at = len(self.pieces)

    def _frame(self, marker: int, body: bytes) -> None:
        _, height, width, count = struct.unpack_from(">BHHB", body)
        self.progressive = marker in _PROGRESSIVE
        if height * width > self.max_pixels:
            return
        parts = [body[6 + 3 * n : 9 + 3 * n] for n in range(count)]
        across = max((part[1] >> 4 for part in parts), default=1) or 1
        down = max((part[1] & 15 for part in parts), default=1) or 1
        self.blocks = {
            part[0]: -(-width * (part[1] >> 4) // (8 * across))
            * -(-height * (part[1] & 15) // (8 * down))
            for part in parts
        }

    def _scan(self, body: bytes) -> None:
        self.scans += 1
        if self.scans > _MOST_SCANS:
            raise too_complex(f"more than {_MOST_SCANS} scans")
        count = body[0]
        first, last = body[1 + 2 * count : 3 + 2 * count] if self.progressive else (0, 63)
        visited = max(0, min(last, 63) - first + 1) + _BLOCK_COST
        self.visits += sum(visited * self.blocks.get(c, 0) for c in body[1 : 1 + 2 * count : 2])

    def _rewrite_exif(self) -> None:
        """Leave the orientation only: one segment, where the first one was."""
        exif = list(self.exif.values())
        if len(exif) == 1 and is_bare(exif[0]):
            return
        for place in self.exif:
            self.pieces[place] = b""
        turn = orientation(b"".join(exif), self.xmp)
        if self.turned_at is not None and turn != UPRIGHT:
            self.pieces[self.turned_at] = _segment(_APP1, _EXIF + bare_exif(turn))

    def _rewrite_profile(self) -> None:
        """Leave what colors need of a profile: in segments where the first one was."""
        if not self.icc:
            return
        parts = sorted(self.icc.values())  # by their numbers, which may come in any order
        whole = b"".join(part[2:] for part in parts)
        reduced = reduced_profile(whole)
        if reduced == whole:
            return
        for place in self.icc:
            self.pieces[place] = b""
        if reduced is not None:
            bodies = [reduced[at : at + _SEGMENT] for at in range(0, len(reduced), _SEGMENT)]
            self.pieces[min(self.icc)] = b"".join(
                _segment(_APP2, _ICC + bytes([number, len(bodies)]) + body)
                for number, body in enumerate(bodies, 1)
            )


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
