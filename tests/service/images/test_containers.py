"""What is no picture is taken out of a file, pixels stay; and what claims too much is refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from service.errors import ServiceError
from service.images.containers import plain

PIXELS = 20_000_000
SECRET = b"Zoe Secret, 52.5200 N"
Kind = Literal["BMP", "JPEG", "PNG", "TIFF", "WEBP"]


def scene(mode: str = "RGB", width: int = 48, height: int = 80) -> Image.Image:
    """A picture whose way up can be told."""
    rows, columns = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(3).integers(0, 40, (height, width))
    pixels = np.stack([rows * 2 + noise, columns * 4 + noise, 255 - rows * 2 - noise // 2], axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def exif(turn: int = 1) -> Image.Exif:
    """What a phone writes: orientation, maker, serial number, position, a thumbnail's place."""
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = turn
    tags[ExifTags.Base.Make] = SECRET.decode()
    tags[ExifTags.Base.BodySerialNumber] = SECRET.decode()
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = SECRET
    gps = tags.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitudeRef] = "N"
    gps[ExifTags.GPS.GPSLatitude] = (52.0, 31.0, 12.0)
    gps[ExifTags.GPS.GPSAreaInformation] = SECRET
    return tags


def xmp(turn: int = 1) -> bytes:
    return b'<x:xmpmeta><rdf:Description tiff:Orientation="%d">%b</x:xmpmeta>' % (turn, SECRET)


def profile() -> bytes:
    """Display P3, as phones embed it, with a name in it."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    description = srgb.index(b"mluc")
    srgb[description + 28 : description + 28 + 10] = SECRET[:10]
    return bytes(srgb)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(data: bytes) -> tuple[str, tuple[int, int], bytes, int]:
    """Mode, size and pixels as Pillow decodes them, upright; and the bands' depth."""
    image = Image.open(io.BytesIO(data))
    image.load()
    upright = ImageOps.exif_transpose(image)
    return image.mode, upright.size, upright.tobytes(), len(upright.getbands())


def icc(data: bytes) -> bytes | None:
    found: bytes | None = Image.open(io.BytesIO(data)).info.get("icc_profile")
    return found


def text_info() -> PngInfo:
    info = PngInfo()
    info.add_text("Comment", SECRET.decode())
    info.add_text("Author", SECRET.decode(), zip=True)
    info.add_itxt("XML:com.adobe.xmp", xmp().decode(), zip=True)
    info.add(b"tIME", struct.pack(">HBBBBB", 2026, 1, 2, 3, 4, 5))
    info.add(b"prVt", SECRET, after_idat=True)
    return info


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg(image: Image.Image, turn: int = 6, **options: Any) -> bytes:
    """A JPEG with everything that a phone or an editor may add."""
    data = saved(
        image,
        "JPEG",
        exif=exif(turn),
        icc_profile=profile(),
        comment=SECRET,
        quality=90,
        **options,
    )
    extra = [
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(turn)),
        segment(0xE2, b"MPF\0" + SECRET),
        segment(0xEB, b"JP\0\0" + SECRET),
        segment(0xED, b"Photoshop 3.0\0" + SECRET),
        segment(0xE0, b"JFXX\0\x10" + saved(scene(), "JPEG")),
    ]
    return data[:2] + b"".join(extra) + data[2:] + saved(scene(), "JPEG", comment=SECRET) + SECRET


def tiff(image: Image.Image, order: Literal["<", ">"], **options: Any) -> bytes:
    """A TIFF with texts, XMP, IPTC, EXIF, GPS and a profile, in either byte order."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II" if order == "<" else b"MM")
    for tag in (270, 271, 305, 315, 316, 33432):
        tags[tag] = SECRET.decode()
    tags[700], tags[33723], tags[34377] = xmp(), SECRET, b"8BIM" + SECRET
    tags.tagtype.update({700: 1, 33723: 7, 34377: 7})
    tags[65000] = SECRET
    if "compression" not in options:  # Pillow cannot write these with a codec
        tags[34665] = dict(exif().get_ifd(ExifTags.IFD.Exif))
        tags[34853] = dict(exif().get_ifd(ExifTags.IFD.GPSInfo))
    if "orientation" in options:
        tags[274] = options.pop("orientation")
    with_profile = {} if image.mode == "I;16" else {"icc_profile": profile()}
    return saved(image, "TIFF", tiffinfo=tags, **with_profile, **options)


def gray16(order: Literal["<", ">"] = "<") -> Image.Image:
    values = np.arange(80 * 48, dtype=np.uint16).reshape(80, 48) * 17
    return Image.frombytes(
        "I;16" if order == "<" else "I;16B", (48, 80), values.astype(f"{order}u2").tobytes()
    )


def bmp_with_more() -> bytes:
    """A V5 bitmap with a linked profile's path, text before the pixels and after them."""
    plain_bmp = saved(scene(), "BMP")
    pixels = plain_bmp[54:]
    head = struct.pack("<IiiHHIIiiII", 124, 48, 80, 1, 24, 0, len(pixels), 2835, 2835, 0, 0)
    head += bytes(16) + b"KNIL" + bytes(52) + struct.pack("<II", 138 - 14 + len(pixels) + 21, 21)
    head = head.ljust(124, b"\0")
    start = 14 + 124 + len(SECRET)
    file = b"BM" + struct.pack("<IHHI", start + len(pixels) + 42, 0, 0, start)
    return file + head + SECRET + pixels + SECRET + SECRET


SENT: dict[str, Callable[[], bytes]] = {
    **{f"JPEG turned {turn}": lambda turn=turn: jpeg(scene(), turn) for turn in range(1, 9)},  # type: ignore[misc]
    "JPEG progressive": lambda: jpeg(scene(), progressive=True),
    "JPEG gray": lambda: jpeg(scene("L")),
    "JPEG CMYK": lambda: jpeg(scene("CMYK")),
    "JPEG restarts": lambda: jpeg(scene(), restart_marker_rows=1),
    "JPEG optimised": lambda: jpeg(scene(), optimize=True, subsampling=0),
    "PNG": lambda: saved(scene(), "PNG", exif=exif(6), pnginfo=text_info(), icc_profile=profile()),
    "PNG alpha": lambda: saved(scene("RGBA"), "PNG", pnginfo=text_info()),
    "PNG palette": lambda: saved(scene("P"), "PNG", exif=exif(3), transparency=7),
    "PNG 16 bit": lambda: saved(gray16(), "PNG", pnginfo=text_info()) + SECRET,
    "WebP lossless": lambda: saved(
        scene("RGBA"), "WEBP", lossless=True, exif=exif(8), xmp=xmp(), icc_profile=profile()
    ),
    "WebP lossy": lambda: saved(scene(), "WEBP", exif=exif(6)) + SECRET,
    "BMP": bmp_with_more,
    "BMP palette": lambda: saved(scene("P"), "BMP") + SECRET,
    "BMP 1 bit": lambda: saved(scene("1"), "BMP") + SECRET,
    **{
        f"TIFF {order} {name}": lambda order=order, options=options: tiff(scene(), order, **options)  # type: ignore[misc]
        for order in "<>"
        for name, options in {
            "raw": {},
            "deflate": {"compression": "tiff_adobe_deflate"},
            "lzw": {"compression": "tiff_lzw", "orientation": 6},
            "packbits": {"compression": "packbits"},
            "jpeg": {"compression": "jpeg"},
            "big": {"big_tiff": True},
            "big lzw": {"big_tiff": True, "compression": "tiff_lzw"},
        }.items()
    },
    **{f"TIFF {o} 16 bit": lambda o=o: tiff(gray16(o), o) for o in "<>"},  # type: ignore[misc]
    "TIFF strips": lambda: tiff(scene("RGB", 1024, 700), "<", compression="tiff_lzw"),
    "TIFF palette": lambda: tiff(scene("P"), "<"),
    "TIFF CMYK": lambda: tiff(scene("CMYK"), ">"),
    "TIFF 1 bit": lambda: tiff(scene("1"), "<", compression="group4"),
}


@pytest.mark.parametrize("name", SENT)
def test_pixels_stay_and_what_is_no_picture_goes(name: str) -> None:
    sent = SENT[name]()
    kept = plain(sent, PIXELS)
    assert shown(kept) == shown(sent)
    assert len(kept) < len(sent)
    for secret in (SECRET, SECRET[:10], b"xmpmeta"):
        assert secret not in kept
    image = Image.open(io.BytesIO(kept))
    assert not image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    assert not image.getexif().get_ifd(ExifTags.IFD.Exif)
    assert not image.getexif().get_ifd(ExifTags.IFD.IFD1)
    assert image.getexif().get(ExifTags.Base.Orientation, 1) == Image.open(
        io.BytesIO(sent)
    ).getexif().get(ExifTags.Base.Orientation, 1)
    assert plain(kept, PIXELS) == kept
