"""BMP: headers, palette, pixels."""

from __future__ import annotations

import struct

from service.images.containers.claims import too_complex

_FILE_HEADER, _CORE, _INFO, _V5 = 14, 12, 40, 124
_RLE8, _RLE4, _BITFIELDS = 1, 2, 3
# Run-length codes are decoded one by one, at a million a second.
_MOST_CODES = 2_000_000
_LINKED, _EMBEDDED, _SRGB = b"KNIL", b"DEBM", b"BGRs"  # color spaces of a V5 header


def plain(data: bytes, max_pixels: int) -> bytes:
    """See `containers.plain`: what lies between headers and pixels and behind them goes."""
    (start,) = struct.unpack_from("<I", data, 10)
    (header,) = struct.unpack_from("<I", data, _FILE_HEADER)
    if header == _CORE:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression, colors, entry = 0, 0, 3
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        (colors,) = struct.unpack_from("<I", data, 46)
        entry = 4
    if width <= 0 or width * abs(height) > max_pixels:
        return data  # refused by its size
    palette = (colors or 1 << bits) * entry if bits <= 8 else 0
    masks = 12 if header == _INFO and compression == _BITFIELDS else 0
    if start == _FILE_HEADER + header:  # some writers forget the palette; Pillow knows that
        start += palette
    headers = _FILE_HEADER + header + masks + palette
    start = start or headers
    if compression in (_RLE8, _RLE4):
        end = _end_of_runs(data, start, compression == _RLE4)
    else:
        end = start + (width * bits + 31) // 32 * 4 * abs(height)
    if end > len(data):
        return data  # cut: decoding says so
    profile = header == _V5 and data[70:74] in (_LINKED, _EMBEDDED)
    if end == len(data) and not any(data[headers:start]) and not profile:
        return data
    clean = bytearray(data[:end])
    clean[2:6] = struct.pack("<I", end)
    if headers < start:
        clean[headers:start] = bytes(start - headers)
    if profile:
        clean[70:74] = _SRGB
        clean[126:134] = bytes(8)  # where it is, and its size
    return bytes(clean)


def _end_of_runs(data: bytes, start: int, four_bits: bool) -> int:
    """Where the code that ends the picture ends, or the data. Raises ImageTooComplex."""
    position = start
    for _ in range(_MOST_CODES):
        code = data[position : position + 2]
        position += 2
        if len(code) < 2:
            return len(data)
        if code[0]:
            continue
        if code[1] == 1:
            return position
        if code[1] == 2:
            position += 2
        elif code[1] > 2:
            position += (code[1] + 1) // 2 if four_bits else code[1]
            position += position & 1  # as Pillow pads: to an even place in the file
    raise too_complex(f"more than {_MOST_CODES:,} run-length codes")
