"""What is no picture is taken out of a file, pixels stay; and what claims too much is refused."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from service.errors import ImageMultiFrame, ImageTooLarge, ServiceError
from service.images.containers import plain

PIXELS = 20_000_000
FEW_PIXELS = 200_000  # so that the dear files here need not be large
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
    """A profile with a name in its description."""
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


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("BMP", mode) for mode in ("RGB", "L", "P", "1", "RGBA")),
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode) for mode in ("RGB", "L", "LA", "P", "1", "RGBA")),
        *(("TIFF", mode) for mode in ("RGB", "L", "P", "1", "RGBA", "CMYK", "I", "F")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_a_file_of_pixels_only_stays_as_it_is(kind: Kind, mode: str) -> None:
    sent = saved(scene(mode), kind)
    assert plain(sent, PIXELS) is sent


def test_the_orientation_may_be_all_that_exif_says() -> None:
    for order in ("<", ">"):
        tags = Image.Exif()
        tags.endian = order
        tags[ExifTags.Base.Orientation] = 6
        for kind in ("JPEG", "PNG", "WEBP"):
            sent = saved(scene(), kind, exif=tags)
            assert plain(sent, PIXELS) == sent


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_orientation_in_xmp_stays_in_force(kind: Kind) -> None:
    options: dict[str, Any] = {"xmp": xmp(6)}
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp(6).decode())
        options = {"pnginfo": info}
    if kind == "TIFF":
        options = {"tiffinfo": {700: xmp(6)}}
    sent = saved(scene(), kind, **options)
    kept = plain(sent, PIXELS)
    assert shown(kept)[1] == shown(sent)[1] == (80, 48)
    assert SECRET not in kept


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_profile_keeps_its_colors_and_nothing_else(kind: Kind) -> None:
    kept = plain(saved(scene(), kind, icc_profile=profile()), PIXELS)
    left = icc(kept)
    assert left is not None
    assert b"mluc" not in left
    assert SECRET[:10] not in left
    seen = [
        ImageCms.profileToProfile(
            scene(),
            ImageCms.ImageCmsProfile(io.BytesIO(one)),
            ImageCms.createProfile("LAB"),
            outputMode="LAB",
        )
        for one in (left, profile())
    ]
    assert seen[0] is not None
    assert seen[1] is not None
    assert seen[0].tobytes() == seen[1].tobytes()


def test_a_profile_that_is_none_goes() -> None:
    kept = plain(saved(scene(), "JPEG", icc_profile=SECRET * 9000), PIXELS)
    assert icc(kept) is None
    assert SECRET not in kept


@pytest.mark.parametrize(
    "name", ["JPEG turned 6", "PNG", "WebP lossy", "BMP", "TIFF < lzw", "TIFF > raw"]
)
def test_damaged_files_are_cleaned_or_refused(name: str) -> None:
    whole, chance = SENT[name](), random.Random(5)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 5])):
            damaged[chance.randrange(chance.choice([64, len(damaged)]))] = chance.randrange(256)
        cut = bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        with suppress(ServiceError):
            plain(cut, PIXELS)


def scans(width: int, height: int, count: int) -> bytes:
    """A gray progressive JPEG of a first scan and `count` more, each of some dozen bytes."""
    blocks = -(-width // 8) * -(-height // 8)
    runs = -(-blocks // (1 << 14))
    ends = int(("0" * 15 * runs).ljust(-(-15 * runs // 8) * 8, "1"), 2)
    scan = ends.to_bytes(-(-15 * runs // 8), "big")
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"
    table = bytes([1] + [0] * 15)
    data = b"\xff\xd8" + segment(0xDB, bytes([0] + [1] * 64)) + segment(0xC2, frame)
    data += segment(0xC4, b"\0" + table + b"\0") + segment(0xC4, b"\x10" + table + b"\xe0")
    data += segment(0xDA, b"\1\1\0\0\0\0") + bytes(-(-blocks // 8))
    for number in range(count):
        bits = max(0, 12 - number)
        data += segment(0xDA, bytes([1, 1, 0, 1, 63, (0 if number == 0 else bits + 1) << 4 | bits]))
        data += scan
    return data + b"\xff\xd9"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def strips(count: int, compression: int, strip: bytes, rows: int = 1, lie: int = 0) -> bytes:
    """A gray TIFF of 16 pixels a row in strips that are all the same bytes."""
    size, at = len(strip) + lie, 8 + len(strip) + lie
    entries = [
        (256, 4, 1, 16),
        (257, 4, 1, count * rows),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, count, at),
        (277, 3, 1, 1),
        (278, 4, 1, rows),
        (279, 4, count, at + 4 * count),
    ]
    body = strip + bytes(lie) + struct.pack("<I", 8) * count + struct.pack("<I", size) * count
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", *e) for e in entries
    )
    return struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + directory + bytes(4)


def runs(count: int) -> bytes:
    """A BMP of run-length codes of one pixel each."""
    body = b"\1\5" * count + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, 400, 490, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + head + bytes(1024) + body


DEAR: dict[str, Callable[[], bytes]] = {
    "JPEG, many scans": lambda: scans(400, 500, 30),
    "JPEG, many scans of a small picture": lambda: scans(64, 128, 200),
    "JPEG, segments": lambda: (
        b"\xff\xd8" + segment(0xE1, b"Exif\0\0") * 9_000 + scans(64, 128, 1)[2:]
    ),
    "PNG, profiles": lambda: (
        saved(scene(), "PNG")[:33]
        + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000))) * 25_000
        + saved(scene(), "PNG")[33:]
    ),
    "PNG, empty chunks": lambda: (
        saved(scene(), "PNG")[:33] + chunk(b"IDAT", b"") * 25_000 + saved(scene(), "PNG")[33:]
    ),
    "WebP, chunks": lambda: webp(*[(b"abcd", b"")] * 25_000),
    "TIFF, strips that are one": lambda: strips(25_000, 1, bytes(16)),
    "TIFF, a million strips that are one": lambda: strips(1_000_000, 1, bytes(16)),
    "TIFF, strips that overlap": lambda: strips(500, 8, zlib.compress(bytes(16)), lie=50_000),
    "TIFF, JPEGs of many scans": lambda: strips(5, 7, scans(400, 490, 6), rows=8, lie=4_000),
    "BMP, runs": lambda: runs(2_100_000),
}


def webp(*extra: tuple[bytes, bytes]) -> bytes:
    """An extended WebP with more chunks before its picture."""
    picture = saved(scene(), "WEBP")[12:]
    canvas = bytes(4) + (47).to_bytes(3, "little") + (79).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + canvas
    body += b"".join(kind + struct.pack("<I", len(part)) + part for kind, part in extra) + picture
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("name", DEAR)
def test_what_is_cheap_to_send_and_dear_to_decode_is_refused(name: str) -> None:
    with pytest.raises(ServiceError) as caught:
        plain(DEAR[name](), FEW_PIXELS)
    assert (caught.value.status, caught.value.code) == (422, "image_too_complex")
    assert "save it again as an ordinary JPEG or PNG" in caught.value.detail


def test_a_canvas_is_measured_before_it_is_allocated() -> None:
    sent = bytearray(webp())
    sent[24:30] = b"\xff\xff\x3f" * 2
    with pytest.raises(ImageTooLarge):
        plain(bytes(sent), PIXELS)


ORDINARY: dict[str, Callable[[], bytes]] = {
    "a progressive photograph": lambda: saved(scene("RGB", 400, 490), "JPEG", progressive=True),
    "one without subsampling": lambda: saved(
        scene("CMYK", 400, 490), "JPEG", progressive=True, optimize=True
    ),
    "a strip for each row": lambda: strips(5_000, 1, bytes(16)),
    "many chunks of image data": lambda: in_small_chunks(saved(scene("RGB", 120, 120), "PNG")),
}


def in_small_chunks(png: bytes) -> bytes:
    """A PNG whose image data come in chunks of 16 bytes."""
    at = png.index(b"IDAT") - 4
    end = png.index(b"IEND") - 4
    image = png[at + 8 : end - 4]
    parts = [chunk(b"IDAT", image[n : n + 16]) for n in range(0, len(image), 16)]
    return png[:at] + b"".join(parts) + png[end:]


@pytest.mark.parametrize("name", ORDINARY)
def test_what_ordinary_encoders_write_passes(name: str) -> None:
    sent = ORDINARY[name]()
    assert shown(plain(sent, FEW_PIXELS)) == shown(sent)


def test_comments_that_unpack_to_gigabytes_are_not_unpacked() -> None:
    bomb = b"k\0\0" + zlib.compress(bytes(100_000_000), 9)
    png = saved(scene(), "PNG")
    assert plain(png[:33] + chunk(b"zTXt", bomb) + png[33:], PIXELS) == png


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_an_animation_is_not_taken_for_its_first_frame(kind: Kind) -> None:
    sent = saved(scene(), kind, save_all=True, append_images=[scene("L").convert("RGB")])
    with pytest.raises(ImageMultiFrame):
        plain(sent, PIXELS)


def test_the_further_pictures_of_a_phone_go() -> None:
    sent = saved(scene(), "MPO", save_all=True, append_images=[scene("RGB", 32, 64)])
    kept = plain(sent, PIXELS)
    assert Image.open(io.BytesIO(kept)).format == "JPEG"
    assert Image.open(io.BytesIO(kept)).tobytes() == Image.open(io.BytesIO(sent)).tobytes()
    assert kept.count(b"\xff\xd9") == 1
