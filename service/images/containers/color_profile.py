"""ICC profiles, reduced to what shows colors right: numbers, no names, dates or serial numbers."""

from __future__ import annotations

import struct

from service.images.containers.claims import MOST_UNPACKED

_HEADER = 128
_TAGS = {
    *(b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC", b"kTRC"),
    *(b"wtpt", b"chad", b"cicp", b"A2B0", b"A2B1"),
}
_NUMBERS = {b"XYZ ", b"curv", b"para", b"sf32", b"cicp", b"mft1", b"mft2", b"mAB "}
_MOST_TAGS = 100
# In the header: the program that is preferred, date, platform, device and who made the profile.
_FORGOTTEN = ((4, 8), (24, 36), (40, 44), (48, 56), (80, _HEADER))


def reduced_profile(profile: bytes) -> bytes | None:
    """A profile with the tags that colors are computed with. None where it is no profile."""
    if len(profile) < _HEADER + 4 or profile[36:40] != b"acsp" or len(profile) > MOST_UNPACKED:
        return None
    (count,) = struct.unpack_from(">I", profile, _HEADER)
    if count > _MOST_TAGS or len(profile) < _HEADER + 4 + 12 * count:
        return None
    kept: dict[bytes, bytes] = {}
    for entry in range(count):
        name, start, size = struct.unpack_from(">4sII", profile, _HEADER + 4 + 12 * entry)
        body = profile[start : start + size]
        if name in _TAGS and body[:4] in _NUMBERS and len(body) == size:
            kept.setdefault(name, body)
    if not kept:
        return None
    return _written(profile[:_HEADER], kept)


def _written(header: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of these tags; equal ones are stored once, as the three curves usually are."""
    start = _HEADER + 4 + 12 * len(tags)
    table, bodies, places = b"", b"", dict[bytes, int]()
    for name, body in sorted(tags.items()):
        if body not in places:
            places[body] = start + len(bodies)
            bodies += body + bytes(-len(body) % 4)
        table += struct.pack(">4sII", name, places[body], len(body))
    clean = bytearray(header)
    for first, last in _FORGOTTEN:
        clean[first:last] = bytes(last - first)
    clean[:4] = struct.pack(">I", start + len(bodies))
    return bytes(clean) + struct.pack(">I", len(tags)) + table + bodies
