"""Uploads of every kind: the good ones come upright in 8 bits, the bad ones are refused in 4xx."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageDraw

from service.errors import ServiceError
from service.images.decode import STORED_LIMITS, Box, Crop, ImageLimits, decode
from tests.paths import MINI

WIDTH, HEIGHT = 40, 64

Order = Literal["<", ">"]  # of the bytes


def picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Red top left, green top right, blue bottom: its orientation can be told."""
    image = Image.new("RGB", (width, height), (20, 30, 200))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 2 - 1, height // 2 - 1), fill=(200, 20, 20))
    draw.rectangle((width // 2, 0, width - 1, height // 2 - 1), fill=(20, 200, 20))
    return image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand: Pillow writes neither 16-bit colour nor lies about sizes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(values: np.ndarray, colour: int) -> bytes:
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, colour, rows)


def tiff(values: np.ndarray, order: Order, **tags: int) -> bytes:
    """An uncompressed TIFF, byte order '<' or '>', of any sample type."""
    values = values.astype(values.dtype.newbyteorder(order))
    height, width = values.shape[:2]
    samples = values.shape[2] if values.ndim == 3 else 1
    data = values.tobytes()
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    bits = 8 * values.dtype.itemsize
    start = 8 + 2 + 12 * (11 if "tile" in tags else 10) + 4
    entries = {
        256: (4, width),
        257: (4, height),
        258: (3, bits),
        259: (3, tags.get("compression", 1)),
        262: (3, tags.get("photometric", 1 if samples == 1 else 2)),
        273: (4, start + 2 * samples),
        277: (3, samples),
        278: (4, height),
        279: (4, len(data)),
        339: (3, sample_format),
    }
    if "tile" in tags:
        for strip, tile in ((273, 324), (279, 325)):
            entries[tile] = entries.pop(strip)
        del entries[278]
        entries |= {322: (4, tags["tile"]), 323: (4, tags["tile"])}
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        if tag == 258 and samples > 2:
            out += struct.pack(order + "HHII", tag, 3, samples, start)
        elif kind == 3:
            out += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
        else:
            out += struct.pack(order + "HHII", tag, 4, 1, value)
    return (
        out
        + struct.pack(order + "I", 0)
        + struct.pack(f"{order}{samples}H", *[bits] * samples)
        + data
    )


def ramp(top: int) -> np.ndarray:
    """Gray values from 0 to `top`, HEIGHT×WIDTH."""
    return np.linspace(0, top, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)


def pixels(crop: Crop) -> np.ndarray:
    return np.asarray(crop.image).astype(int)


def refused(data: bytes, **options: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        decode(data, **options)
    assert 400 <= caught.value.status < 500
    assert "; " in caught.value.detail  # what is wrong; what to do
    return caught.value


FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "TIFF": {},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_picture_and_keeps_the_upload(kind: str) -> None:
    data = saved(picture(), kind, **FORMATS[kind])
    crop = decode(data)
    assert np.abs(pixels(crop) - np.asarray(picture()).astype(int)).mean() < 2
    assert (crop.width, crop.height, crop.bit_depth) == (WIDTH, HEIGHT, 8)
    assert (crop.modality, crop.modality_source) == ("rgb", "detected")
    assert crop.data == data
    assert crop.sha256 == hashlib.sha256(data).hexdigest()
    assert crop.media_type == f"image/{kind.lower()}"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    upright = picture()
    back = {  # the inverse of what a reader has to do
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(back[orientation])
    exif = Image.Exif()
    exif[274] = orientation
    crop = decode(saved(stored, kind, exif=exif, **FORMATS[kind]))
    assert (crop.width, crop.height) == upright.size
    assert np.abs(pixels(crop) - np.asarray(upright).astype(int)).mean() < 2


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = saved(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert decode(data).width == WIDTH


def test_a_box_is_cut_after_orientation_and_stored_without_loss() -> None:
    exif = Image.Exif()
    exif[274] = 6
    turned = picture(80, 128).transpose(Image.Transpose.ROTATE_90)
    crop = decode(saved(turned, "PNG", exif=exif), box=Box(30, 44, 20, 40))
    assert (crop.width, crop.height, crop.media_type) == (20, 40, "image/png")
    assert (pixels(crop) == np.asarray(picture(80, 128))[44:84, 30:50]).all()
    again = decode(crop.data)
    assert (pixels(again) == pixels(crop)).all()


@pytest.mark.parametrize(
    "box",
    [
        Box(-1, 0, 20, 40),
        Box(0, -1, 20, 40),
        Box(21, 0, 20, 40),
        Box(0, 25, 20, 40),
        Box(0, 0, 0, 40),
        Box(0, 0, -20, -40),
        Box(10**30, 0, 20, 40),
    ],
)
def test_a_box_must_lie_inside(box: Box) -> None:
    assert refused(saved(picture(), "PNG"), box=box).code == "box_outside"


def test_a_box_must_be_large_enough() -> None:
    assert refused(saved(picture(), "PNG"), box=Box(0, 0, 15, 32)).code == "image_too_small"
    assert decode(saved(picture(), "PNG"), box=Box(12, 16, 16, 32)).width == 16


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_wide_gray_is_scaled_not_clipped(kind: str, bits: int, order: Order) -> None:
    """A ramp over all of b bits becomes the ramp over 8, whatever the container."""
    values = ramp((1 << bits) - 1)
    crop = decode(png16(values, 0) if kind == "png" else tiff(values, order))
    expected = values * 255.0 / ((1 << bits) - 1)
    assert np.abs(pixels(crop)[..., 0] - expected).max() <= 0.51
    assert (crop.bit_depth, crop.modality) == (16, "ir")


@pytest.mark.parametrize("order", "<>")
def test_a_narrow_band_of_16_bits_is_stretched(order: Order) -> None:
    values = 29_000 + ramp(1_500)  # a thermal picture in hundredths of a kelvin
    gray = pixels(decode(tiff(values, order)))[..., 0]
    assert gray.min() == 0
    assert gray.max() == 255
    assert len(np.unique(gray)) > 250
    assert (np.diff(gray.ravel()) >= 0).all()


def test_hot_pixels_do_not_darken_a_12_bit_picture() -> None:
    values = ramp(4095)
    plain = pixels(decode(png16(values, 0)))
    values[5, 5] = 65535
    assert np.abs(pixels(decode(png16(values, 0))) - plain).mean() < 2


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("top", [4095, 65535])
@pytest.mark.parametrize("kind", ["png", "tiff", "png-alpha"])
def test_wide_colour_is_scaled_by_all_its_bits(kind: str, top: int, order: Order) -> None:
    red = ramp(top)
    values = np.stack([red, red[::-1], red // 3], axis=2)
    if kind == "png":
        data = png16(values, 2)
    elif kind == "png-alpha":
        data = png16(np.concatenate([values, np.full_like(values[..., :1], 65535)], 2), 6)
    else:
        data = tiff(values, order)
    crop = decode(data)
    assert np.abs(pixels(crop) - values * 255.0 / top).max() <= 0.51
    assert (crop.bit_depth, crop.modality) == (16, "rgb")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i2", "i4", "f4"])
def test_signed_32_bit_and_float_values_are_stretched(dtype: str, order: Order) -> None:
    values = (ramp(2000).astype("f8") - 1000).astype(dtype)
    crop = decode(tiff(values, order))
    gray = pixels(crop)[..., 0]
    assert (gray.min(), gray.max()) == (0, 255)
    assert (np.diff(gray.ravel()) >= 0).all()
    assert crop.bit_depth == 8 * values.dtype.itemsize


def test_white_is_zero_is_turned_round() -> None:
    values = ramp(65535)
    gray = pixels(decode(tiff(values, "<", photometric=0)))[..., 0]
    assert np.abs(gray - (65535 - values.astype(int)) / 257).max() <= 0.51


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    image = picture().convert(mode)
    crop = decode(saved(image, kind))
    assert isinstance(crop.image, Image.Image)
    assert crop.image.mode == "RGB"
    expected = image.convert("RGB")
    assert np.abs(pixels(crop) - np.asarray(expected).astype(int)).mean() < 4
    assert crop.bit_depth == (1 if mode == "1" else 8)
    assert crop.modality == ("ir" if mode in ("1", "L", "LA") else "rgb")


@pytest.mark.parametrize("form", ["rgba", "palette", "colour key"])
def test_transparent_parts_lie_on_gray(form: str) -> None:
    image = picture().convert("RGBA")
    image.paste((200, 20, 20, 0), (0, 0, WIDTH // 2, HEIGHT // 2))
    data = saved(image, "PNG")
    if form == "palette":
        flat = picture().quantize(4)
        data = saved(flat, "PNG", transparency=flat.getpixel((0, 0)))
    elif form == "colour key":
        data = saved(picture(), "PNG", transparency=(200, 20, 20))
    corner = pixels(decode(data))[: HEIGHT // 2, : WIDTH // 2]
    assert (corner == 128).all()


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("kind", ["JPEG 4:4:4", "JPEG 4:2:0", "WEBP"])
def test_modality_is_detected_through_codec_noise(kind: str, quality: int) -> None:
    """A gray picture with a little noise on every channel is infrared, a dull one visible."""
    rng = np.random.default_rng(1)
    shade = np.kron(rng.integers(20, 220, (8, 5, 1)), np.ones((16, 16, 1)))
    noise = rng.normal(0, 1.5, (128, 80, 3))
    tint = np.zeros((128, 80, 3))
    tint[32:96, 16:64] = (8, -2, -6)  # a faded brown shirt

    def stored(values: np.ndarray) -> bytes:
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
        if kind == "WEBP":
            return saved(image, "WEBP", quality=quality)
        return saved(image, "JPEG", quality=quality, subsampling=0 if "4:4:4" in kind else 2)

    assert decode(stored(shade + noise)).modality == "ir"
    assert decode(stored(shade + noise + tint)).modality == "rgb"


def test_a_given_modality_is_believed() -> None:
    crop = decode(saved(picture(), "PNG"), modality="ir")
    assert (crop.modality, crop.modality_source) == ("ir", "given")


@pytest.mark.parametrize("box", [None, Box(4, 4, 24, 40)])
def test_a_black_hot_picture_is_inverted_but_stored_as_it_came(box: Box | None) -> None:
    shades = Image.fromarray(np.asarray(picture().convert("L")))
    plain = decode(saved(shades, "PNG"), box=box)
    turned = decode(saved(shades, "PNG"), box=box, polarity="black_hot")
    assert (pixels(turned) == 255 - pixels(plain)).all()
    assert turned.data == plain.data
    assert (plain.polarity, turned.polarity) == ("white_hot", "black_hot")
    again = decode(turned.data, modality="ir", polarity="black_hot")
    assert (pixels(again) == pixels(turned)).all()


def test_a_visible_picture_has_no_polarity() -> None:
    crop = decode(saved(picture(), "PNG"), polarity="black_hot")
    assert crop.polarity is None
    assert (pixels(crop) == pixels(decode(saved(picture(), "PNG")))).all()


def shaded() -> Image.Image:
    """A gray picture with the kind of detail that a codec needs its bytes for."""
    light = np.linspace(40, 220, 4 * WIDTH)[None, :] * np.ones((4 * HEIGHT, 1))
    noise = np.random.default_rng(2).normal(0, 12, light.shape)
    return Image.fromarray((light + noise).clip(0, 255).astype(np.uint8))


def half_jpeg(**options: Any) -> bytes:
    """Cut in the middle of its data, with an end marker put after."""
    data = saved(shaded().convert(options.pop("mode", "RGB")), "JPEG", **options)
    return data[: len(data) // 2] + b"\xff\xd9"


def half_png(bits: int, samples: int, colour: int) -> bytes:
    """Half of the rows, with a whole stream and right checksums."""
    row = b"\0" + bytes(range(WIDTH)) * (samples * bits // 8)
    return png(WIDTH, HEIGHT, bits, colour, row * (HEIGHT // 2))


def half_webp(lossless: bool) -> bytes:
    data = saved(shaded(), "WEBP", lossless=lossless)
    chunk = data[20 : 20 + (len(data) - 20) // 4 * 2]
    sizes = (12 + len(chunk)).to_bytes(4, "little"), len(chunk).to_bytes(4, "little")
    return b"RIFF" + sizes[0] + data[8:16] + sizes[1] + chunk


def tiff_of_half_a_strip() -> bytes:
    whole = tiff(np.asarray(shaded().resize((WIDTH, HEIGHT))), "<")
    size = struct.pack("<HHII", 279, 4, 1, WIDTH * HEIGHT)
    assert size in whole
    return whole.replace(size, struct.pack("<HHII", 279, 4, 1, WIDTH * HEIGHT // 2))


def tiff_of_a_half_jpeg() -> bytes:
    jpeg = half_jpeg(mode="L")
    data = tiff(np.zeros((4 * HEIGHT, 4 * WIDTH), np.uint8), "<", compression=7)
    size = struct.pack("<HHII", 279, 4, 1, 16 * WIDTH * HEIGHT)
    start = len(data) - 16 * WIDTH * HEIGHT
    return data[:start].replace(size, struct.pack("<HHII", 279, 4, 1, len(jpeg))) + jpeg


HALVES: dict[str, Callable[[], bytes]] = {
    "JPEG": half_jpeg,
    "JPEG, bytes behind": lambda: half_jpeg() + b"anything" * 99 + b"\xff\xd9",
    "JPEG, gray": lambda: half_jpeg(mode="L"),
    "JPEG, four channels": lambda: half_jpeg(mode="CMYK"),
    "JPEG, progressive": lambda: half_jpeg(progressive=True),
    "JPEG, restarts": lambda: half_jpeg(restart_marker_blocks=4),
    "PNG, gray": lambda: half_png(8, 1, 0),
    "PNG, 16 bits": lambda: half_png(16, 1, 0),
    "PNG, colour": lambda: half_png(8, 3, 2),
    "PNG, alpha": lambda: half_png(8, 4, 6),
    "WebP": lambda: half_webp(False),
    "WebP, lossless": lambda: half_webp(True),
    "BMP": lambda: saved(shaded(), "BMP")[:9000],
    "TIFF": tiff_of_half_a_strip,
    "TIFF, JPEG": tiff_of_a_half_jpeg,
}


@pytest.mark.parametrize("form", HALVES)
def test_a_picture_whose_pixels_are_not_all_there_is_refused(form: str) -> None:
    assert refused(HALVES[form]()).code == "image_truncated"


def test_a_large_half_picture_is_refused_and_a_whole_one_accepted() -> None:
    """From a million pixels on the second look is taken on suspicion only."""
    data = saved(shaded().resize((1000, 1100)), "JPEG", quality=30)
    assert decode(data).width == 1000
    assert refused(data[: len(data) // 2] + b"\xff\xd9").code == "image_truncated"


@pytest.mark.parametrize("end", [b"", bytes(3000), b"\xff" * 3000, b"\r\n"])
def test_a_jpeg_without_its_end_marker_is_refused_whatever_follows(end: bytes) -> None:
    data = saved(picture(), "JPEG")
    assert data.endswith(b"\xff\xd9")
    assert refused(data[:-2] + end).code == "image_truncated"


def test_what_cameras_put_behind_the_end_marker_does_no_harm() -> None:
    data = saved(picture(), "JPEG")
    behind = random.Random(4).randbytes(500)
    assert (pixels(decode(data + behind)) == pixels(decode(data))).all()


def test_a_picture_that_is_stored_already_is_not_judged_again() -> None:
    for data in (half_jpeg(), saved(Image.new("L", (WIDTH, HEIGHT)), "PNG")):
        assert decode(data, limits=STORED_LIMITS).modality == "ir"


def warm_person() -> np.ndarray:
    """Kelvin: a room of 294 K with some noise, and a person of 299 to 303 K in its middle."""
    y, x = np.mgrid[:128, :64]
    body = np.exp(-(((y - 64) / 40) ** 2) - ((x - 32) / 10) ** 2)
    return np.asarray(294 + 9 * body + np.random.default_rng(3).normal(0, 0.2, body.shape))


def centikelvin(kelvin: np.ndarray) -> bytes:
    return png16((100 * kelvin).round().clip(0, 65535).astype(np.uint16), 0)


def framed(values: np.ndarray, value: float, sides: str) -> np.ndarray:
    """With a border of `value` on top, bottom, left, right (their first letters)."""
    values, width = values.copy(), 6
    places: dict[str, Any] = {
        "t": np.s_[:width],
        "b": np.s_[-width:],
        "l": np.s_[:, :width],
        "r": np.s_[:, -width:],
    }
    for side in sides:
        values[places[side]] = value
    return values


PERSON = np.s_[32:96, 20:44]


@pytest.mark.parametrize("sides", ["tblr", "t", "b", "l", "r", "lr"])
@pytest.mark.parametrize("value", [0, 1.0, 250, 400, 655.35])
def test_a_border_does_not_set_the_range_of_a_thermal_picture(value: float, sides: str) -> None:
    plain = pixels(decode(centikelvin(warm_person())))[PERSON]
    other = pixels(decode(centikelvin(framed(warm_person(), value, sides))))[PERSON]
    assert np.ptp(plain) > 200
    assert np.abs(other - plain).max() <= 3


@pytest.mark.parametrize(
    "value", [0, -9999, -32768, -1e38, -273.15, 1e20, 9999, np.nan, np.inf, -np.inf]
)
def test_what_stands_for_no_value_does_not_set_the_range(value: float) -> None:
    celsius = (warm_person() - 273.15).astype("f4")
    plain = pixels(decode(tiff(celsius, "<")))[PERSON]
    holes = celsius.copy()
    holes[:20, :20] = holes[100:, 40:] = value
    for other in (framed(celsius, value, "tblr"), holes):
        assert np.abs(pixels(decode(tiff(other, "<")))[PERSON] - plain).max() <= 3


@pytest.mark.parametrize("lines", [1, 3])
def test_telemetry_does_not_set_the_range(lines: int) -> None:
    plain = pixels(decode(centikelvin(warm_person())))[PERSON]
    for top in (655.0, 3.0):
        values = warm_person()
        values[-lines:] = np.random.default_rng(1).uniform(0, top, (lines, 64))
        assert np.abs(pixels(decode(centikelvin(values)))[PERSON] - plain).max() <= 3


def test_the_range_is_that_of_the_box() -> None:
    """A hot lamp beside the person does not matter to a crop of the person."""
    scene = np.concatenate([warm_person(), np.full((128, 20), 480.0)], axis=1)
    crop = decode(centikelvin(scene), box=Box(0, 0, 64, 128))
    assert (pixels(crop) == pixels(decode(centikelvin(warm_person())))).all()


@pytest.mark.parametrize("alpha", [65535, 4095, 0])
def test_16_bit_gray_with_alpha_is_the_gray_picture(alpha: int) -> None:
    values = ramp(4095)
    crop = decode(png16(np.stack([values, np.full_like(values, alpha)], axis=2), 4))
    assert (pixels(crop) == pixels(decode(png16(values, 0)))).all()
    assert crop.bit_depth == 16


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_an_alpha_of_zero_everywhere_is_no_alpha(kind: str) -> None:
    image = picture()
    image.putalpha(0)
    options = {"WEBP": {"lossless": True, "exact": True}}.get(kind, {})
    data = saved(image, kind, **options)
    if kind == "BMP":  # Pillow writes alpha with a header that says nothing of it
        data = bmp_with_alpha(image)
    assert (pixels(decode(data)) == np.asarray(picture())).all()


def bmp_with_alpha(image: Image.Image) -> bytes:
    """A BMP with a V5 header, whose masks name an alpha."""
    bottom_up = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    rows = np.asarray(bottom_up)[..., [2, 1, 0, 3]].tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 124, *image.size, 1, 32, 3, len(rows), 0, 0, 0, 0)
    head += masks + b"sRGB"
    head += bytes(124 - len(head))
    return b"BM" + struct.pack("<IHHI", 138 + len(rows), 0, 0, 138) + head + rows


@pytest.mark.parametrize("order", "<>")
def test_signed_bytes_are_stretched_as_wider_signed_values_are(order: Order) -> None:
    values = ramp(255).astype("i2") - 128
    expected = pixels(decode(tiff(values, order)))
    assert (pixels(decode(tiff(values.astype("i1"), order))) == expected).all()


def test_unsigned_32_bits_are_not_taken_for_negative() -> None:
    values = ramp(60_000).astype("u4") * 70_000
    gray = pixels(decode(tiff(values, "<")))[..., 0]
    assert (np.diff(gray.ravel()) >= 0).all()
    assert np.ptp(gray) == 255


def covered(base: float, deviation: float, bits: int) -> bytes:
    noise = np.random.default_rng(0).normal(base, deviation, (128, 64)).round()
    if bits == 16:
        return png16(noise.clip(0, 65535).astype(np.uint16), 0)
    return saved(Image.fromarray(noise.clip(0, 255).astype(np.uint8)), "PNG")


BLANK: dict[str, Callable[[], bytes]] = {
    "black": lambda: saved(Image.new("L", (64, 128)), "PNG"),
    "white": lambda: saved(Image.new("RGB", (64, 128), (255, 255, 255)), "JPEG"),
    "a blue screen": lambda: saved(Image.new("RGB", (64, 128), (0, 0, 200)), "WEBP"),
    "noise on black": lambda: covered(0, 3, 8),
    "noise on gray": lambda: covered(90, 8, 8),
    "noise in a narrow band of 16 bits": lambda: covered(7000, 4, 16),
    "no value at all": lambda: tiff(np.full((128, 64), np.nan, "f4"), "<"),
    "black in a white frame": lambda: saved(
        Image.fromarray(framed(np.zeros((128, 64), np.uint8), 255, "tblr")), "PNG"
    ),
}


@pytest.mark.parametrize("name", BLANK)
def test_a_picture_that_shows_nothing_is_refused(name: str) -> None:
    assert refused(BLANK[name]()).code == "image_blank"


def crops(cameras: str) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for c in cameras for file in MINI.glob(f"cam{c}/*/*")]


def test_a_dark_picture_is_not_blank() -> None:
    for image in crops("123456"):
        dark = image.point(lambda level: level // 5)
        assert decode(saved(dark, "JPEG"), modality="ir").width == image.width


def test_visible_crops_are_visible_and_infrared_ones_infrared() -> None:
    assert {decode(saved(image, "JPEG")).modality for image in crops("1245")} == {"rgb"}
    assert {decode(saved(image, "JPEG")).modality for image in crops("36")} == {"ir"}


def tinted(image: Image.Image, *factors: float) -> Image.Image:
    values = np.asarray(image) * np.array(factors)
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def drawn(image: Image.Image, text: str = "") -> Image.Image:
    image = image.copy()
    draw = ImageDraw.Draw(image)
    draw.rectangle((1, 1, image.width - 2, image.height - 2), outline=(0, 255, 0), width=2)
    if text:
        draw.rectangle((1, 1, image.width - 2, 11), fill=(0, 200, 0))
        draw.text((2, 0), text, fill=(255, 255, 255))
    return image


COLOURED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "a filter that is stuck": lambda image: tinted(image, 1.08, 0.96, 1.08),
    "an offset": lambda image: image.point(
        [*range(256), *range(256), *range(12, 256), *[255] * 12]
    ),
    "sepia": lambda image: tinted(image, 1.07, 0.86, 0.67),
    "phosphor": lambda image: tinted(image, 0.1, 1, 0.15),
    "a box": drawn,
    "a box with its label": lambda image: drawn(image, "person .93"),
    "a tint and a box": lambda image: drawn(tinted(image, 1.06, 0.97, 1.06)),
}


@pytest.mark.parametrize("form", COLOURED)
def test_infrared_is_infrared_however_it_is_coloured(form: str) -> None:
    taken = [decode(saved(COLOURED[form](i), "JPEG", quality=90)) for i in crops("36")]
    assert sum(crop.modality == "ir" for crop in taken) >= 0.9 * len(taken)
    assert all((np.ptp(pixels(crop), axis=2) == 0).all() for crop in taken if crop.polarity)


PALETTE = [(0, 0, 30), (40, 0, 130), (170, 20, 140), (230, 80, 40), (255, 180, 20), (255, 255, 210)]


def test_a_palette_is_turned_back_into_one_channel() -> None:
    found = 0
    for image in crops("36"):
        gray = np.asarray(image.convert("L"), dtype=float)
        low, high = np.percentile(gray, (1, 99))
        place = ((gray - low) / (high - low) * 5).clip(0, 5)
        channels = [np.interp(place, range(6), channel) for channel in zip(*PALETTE, strict=True)]
        coloured = Image.fromarray(np.stack(channels, axis=2).round().astype(np.uint8))
        crop = decode(saved(coloured, "JPEG", quality=90))
        assert crop.modality == "ir"
        order = np.corrcoef(place.ravel(), pixels(crop)[..., 0].ravel())[0, 1]
        found += order > 0.9  # also: what is hot is bright
    assert found >= 0.9 * len(crops("36"))


GIF = saved(picture(), "GIF")
ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as archive:
    archive.writestr("crop.jpg", saved(picture(), "JPEG"))


def webp_header(width: int, height: int) -> bytes:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + size
    return b"RIFF" + struct.pack("<I", len(body)) + body + b"\0" * 64


def tiff_header(width: int, height: int) -> bytes:
    small = tiff(np.zeros((HEIGHT, WIDTH), np.uint8), "<")
    old = struct.pack("<HHII", 256, 4, 1, WIDTH) + struct.pack("<HHII", 257, 4, 1, HEIGHT)
    new = struct.pack("<HHII", 256, 4, 1, width) + struct.pack("<HHII", 257, 4, 1, height)
    assert old in small
    return small.replace(old, new)


def tiff_with_huge_tile() -> bytes:
    """libtiff would allocate 60,000×60,000 pixels for one tile of a small picture."""
    return tiff(np.zeros((HEIGHT, WIDTH), np.uint8), "<", compression=5, tile=60_000)


def frames(kind: str) -> bytes:
    return saved(
        picture(), kind, save_all=True, append_images=[picture().rotate(180), picture().rotate(90)]
    )


REFUSED: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "empty": (lambda: b"", 422, "image_empty"),
    "text": (lambda: b"hello, this is no image", 415, "image_type_unsupported"),
    "one byte": (lambda: b"\xff", 415, "image_type_unsupported"),
    "svg": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
        415,
        "image_type_unsupported",
    ),
    "html": (lambda: b"<!doctype html><img src=x onerror=alert(1)>", 415, "image_type_unsupported"),
    "zip": (ZIP.getvalue, 415, "image_type_unsupported"),
    "gif": (lambda: GIF, 415, "image_type_unsupported"),
    "animated gif": (lambda: frames("GIF"), 415, "image_type_unsupported"),
    "png magic only": (lambda: b"\x89PNG\r\n\x1a\n", 422, "image_undecodable"),
    "jpeg magic, text": (lambda: b"\xff\xd8\xff\xe0 hello" * 9, 422, "image_truncated"),
    "jpeg called png": (
        lambda: b"\x89PNG\r\n\x1a\n" + saved(picture(), "JPEG"),
        422,
        "image_undecodable",
    ),
    "1x1": (lambda: saved(picture(2, 2).crop((0, 0, 1, 1)), "PNG"), 422, "image_too_small"),
    "15 wide": (lambda: saved(picture(15, 64), "PNG"), 422, "image_too_small"),
    "31 high": (lambda: saved(picture(64, 31), "PNG"), 422, "image_too_small"),
    "65000x1": (lambda: saved(Image.new("L", (65_000, 1)), "JPEG"), 422, "image_too_small"),
    "too many pixels": (
        lambda: saved(Image.new("1", (5_000, 4_001)), "PNG"),
        413,
        "image_too_large",
    ),
    "30000x30000 png": (lambda: png(30_000, 30_000, 8, 0, b"\0" * 9_000), 413, "image_too_large"),
    "30000x30000 tiff": (lambda: tiff_header(30_000, 30_000), 413, "image_too_large"),
    "16383x16383 webp": (lambda: webp_header(16_383, 16_383), 413, "image_too_large"),
    "16m x 16m webp": (lambda: webp_header(1 << 24, 1 << 24), 413, "image_too_large"),
    "huge tile": (tiff_with_huge_tile, 413, "image_too_large"),
    "png of 2^31": (lambda: png(2**31 - 1, 2**31 - 1, 16, 6, b""), 413, "image_too_large"),
    "frames apng": (lambda: frames("PNG"), 422, "image_multi_frame"),
    "frames webp": (lambda: frames("WEBP"), 422, "image_multi_frame"),
    "frames tiff": (lambda: frames("TIFF"), 422, "image_multi_frame"),
    "double tiff": (lambda: tiff(ramp(100).astype("f8"), "<"), 422, "image_undecodable"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_crop_is_refused(name: str) -> None:
    make, status, code = REFUSED[name]
    error = refused(make())
    assert (error.status, error.code) == (status, code)


def test_too_many_bytes_are_refused_before_decoding() -> None:
    data = saved(picture(), "PNG")
    assert refused(data + b"\0" * 20_000_001).code == "image_too_large"
    assert refused(data, limits=ImageLimits(max_bytes=len(data) - 1)).code == "image_too_large"


@pytest.mark.parametrize(
    "kind", ["JPEG", "progressive", "PNG", "WEBP", "lossy", "BMP", "TIFF", "LZW"]
)
def test_truncated_files_are_refused(kind: str) -> None:
    """Cut at every tenth of the length; never filled up with gray."""
    image = Image.effect_noise((WIDTH, HEIGHT), 80).convert("RGB")
    data = {
        "JPEG": lambda: saved(image, "JPEG"),
        "progressive": lambda: saved(image, "JPEG", progressive=True),
        "PNG": lambda: saved(image, "PNG"),
        "WEBP": lambda: saved(image, "WEBP", lossless=True),
        "lossy": lambda: saved(image, "WEBP"),
        "BMP": lambda: saved(image, "BMP"),
        "TIFF": lambda: tiff(np.asarray(image), "<"),
        "LZW": lambda: saved(image, "TIFF", compression="tiff_lzw"),
    }[kind]()
    assert decode(data).width == WIDTH
    for tenth in range(10):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of some cut TIFF headers
            error = refused(data[: len(data) * tenth // 10])
        assert error.code in {
            "image_empty",
            "image_truncated",
            "image_undecodable",
            "image_type_unsupported",
        }


def test_a_polyglot_is_judged_as_the_image_it_starts_as() -> None:
    crop = decode(saved(picture(), "JPEG") + ZIP.getvalue() + b"<script>alert(1)</script>")
    assert crop.media_type == "image/jpeg"
    assert crop.width == WIDTH


def test_damaged_bytes_never_raise_anything_but_a_client_error() -> None:
    """2,000 files with random bytes changed: decoded or refused, nothing else."""
    dice = random.Random(5)
    sources = [saved(picture(), kind, **FORMATS[kind]) for kind in FORMATS]
    sources += [
        png16(ramp(4095), 0),
        tiff(ramp(4095), ">"),
        saved(picture(), "TIFF", compression="jpeg"),
    ]
    outcomes = {"decoded": 0, "refused": 0}
    statuses: set[int] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for round_ in range(2_000):
            data = bytearray(sources[round_ % len(sources)])
            for _ in range(dice.randint(1, 6)):
                data[dice.randrange(min(len(data), 400))] = dice.randrange(256)
            try:
                decode(bytes(data))
                outcomes["decoded"] += 1
            except ServiceError as error:
                outcomes["refused"] += 1
                statuses.add(error.status)
    assert min(outcomes.values()) > 100
    assert all(400 <= status < 500 for status in statuses)
