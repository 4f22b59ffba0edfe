"""Image bytes → a checked, upright 8-bit crop, with its modality: for service and training.

Pillow only, restricted to five formats. Every size is read from the header and checked before a
pixel is decoded; whatever a codec raises becomes a `PictureError`. Files that lack pixels are
refused, never filled up, and so is a picture that shows nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from PIL import ExifTags, Image, ImageOps

from model.modalities import Modality, ModalityChoice, Polarity
from model.pictures import bit_depth
from model.pictures.content import is_blank
from model.pictures.errors import PictureError, truncated
from model.pictures.modality import as_infrared, chroma_step, is_visible
from model.pictures.whole import File, check_file, loaded

Format = Literal["JPEG", "PNG", "WEBP", "BMP", "TIFF"]
T = TypeVar("T")

# Of what a picture becomes below: raise it with every change of that, so that nothing which was
# computed from pictures read otherwise is taken for the same.
POLICY = 2

_BACKGROUND = 128  # under transparent pixels: gray, so that no chroma and no hard edge is added
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323

# EXIF orientation → what brings the picture upright (TIFF 6.0, tag 274).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Box(NamedTuple):
    """A part of a frame in pixels, after orientation."""

    x: int
    y: int
    width: int
    height: int


class ImageLimits(NamedTuple):
    """What an image may be; pixels count before a box is cut out.

    judged: whether pictures without content, and files whose pixels are not all there, are refused.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 20_000_000
    min_width: int = 16
    min_height: int = 32
    judged: bool = True


@dataclass(frozen=True)
class Reading:
    """A picture as it was sent, and as the network is given it.

    upright: mode RGB, 8 bits, the box cut out. image: the same where the picture is visible; of
    infrared its brightness on three equal channels, warm (or bright) in white. bit_depth: of the
    file. detected: whether the modality is the detector's. polarity: None of a visible picture.
    """

    upright: Image.Image
    image: Image.Image
    format: Format
    bit_depth: int
    modality: Modality
    detected: bool
    polarity: Polarity | None


def read(
    data: bytes,
    *,
    modality: ModalityChoice = "auto",
    polarity: Polarity = "white_hot",
    box: Box | None = None,
    limits: ImageLimits | None = None,
) -> Reading:
    """Read one image. Raises PictureError, with one sentence each.

    polarity: of the picture if it is infrared: `black_hot` is inverted.
    """
    limits = limits or ImageLimits()
    if not data:
        raise PictureError("image_empty", "the image has 0 bytes", "send the file's content")
    if len(data) > limits.max_bytes:
        raise PictureError(
            "image_too_large",
            f"the image has {len(data):,} bytes, the limit is {limits.max_bytes:,}",
            "send a smaller crop",
        )
    kind = _kind(data)
    file = File(data, kind)
    image = _guarded(lambda: _opened(file, limits))
    _check_header(image, box, limits)
    samples = _guarded(lambda: bit_depth.samples_of(image))
    orientation = _orientation(image)
    planes = _guarded(lambda: _planes(file, samples, limits, image))
    upright = _guarded(lambda: _upright(planes, samples, orientation, box))

    def frame() -> Image.Image:
        return _guarded(lambda: _upright(planes, samples, orientation, None))

    _check_small(upright.width, upright.height, limits)
    if limits.judged and is_blank(upright if box is None else frame()):
        raise PictureError(
            "image_blank",
            "the image shows nothing but one shade or noise",
            "send a picture of a person, and see whether the camera is covered",
        )
    taken = modality if modality != "auto" else _detected(upright, chroma_step(image))
    shown = upright if taken == "rgb" else as_infrared(upright)
    if taken == "ir" and polarity == "black_hot":
        shown = ImageOps.invert(shown)
    return Reading(
        upright=upright,
        image=shown,
        format=kind,
        bit_depth=samples.depth,
        modality=taken,
        detected=modality == "auto",
        polarity=polarity if taken == "ir" else None,
    )


def _detected(image: Image.Image, step: int) -> Modality:
    return "rgb" if is_visible(image, step) else "ir"


def _kind(data: bytes) -> Format:
    """The format by its first bytes; names and media types are not trusted."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"BM"):
        return "BMP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    raise PictureError(
        "image_type_unsupported",
        "the image is no JPEG, PNG, WebP, BMP or TIFF",
        "convert it to one",
    )


def _open(file: File) -> Image.Image:
    return Image.open(io.BytesIO(file.data), formats=[file.kind])


def _opened(file: File, limits: ImageLimits) -> Image.Image:
    if limits.judged:
        check_file(file)
    return _open(file)


def _guarded(step: Callable[[], T]) -> T:
    """Run a step of a codec; whatever it raises is the file's fault."""
    try:
        return step()
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(
            "image_too_large", "the image has too many pixels", "send a smaller crop"
        ) from error
    except Exception as error:
        if "truncated" in str(error).lower():
            raise truncated() from error
        raise PictureError(
            "image_undecodable",
            "the image cannot be decoded: it is damaged or of a variant that is not supported",
            "save it again as JPEG or PNG",
        ) from error


def _check_header(image: Image.Image, box: Box | None, limits: ImageLimits) -> None:
    """Refuse by size and frames, before pixels are decoded."""
    sizes = [image.width * image.height]
    tags = getattr(image, "tag_v2", {})  # libtiff allocates whole tiles
    sizes.append(_number(tags.get(_TIFF_TILE_WIDTH)) * _number(tags.get(_TIFF_TILE_LENGTH)))
    if max(sizes) > limits.max_pixels:
        raise PictureError(
            "image_too_large",
            f"the image has {max(sizes):,} pixels, the limit is {limits.max_pixels:,}",
            "send a smaller crop",
        )
    # A JPEG of several pictures (MPO, phones) has a main one; pages and animations have not.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise PictureError(
            "image_multi_frame", "the image has several frames or pages", "send one of them"
        )
    if box is None and max(image.size) < limits.min_height:
        _check_small(*image.size, limits)


def _planes(
    file: File,
    samples: bit_depth.Samples,
    limits: ImageLimits,
    opened: Image.Image,
) -> list[Image.Image]:
    """Decode → the image, or those of the high and of the low bytes of 16-bit colour.

    opened: the image, not yet loaded. A JPEG is decoded from it, which saves reading its header.
    """
    ready = [opened] if file.kind == "JPEG" else []

    def first() -> Image.Image:
        image = ready.pop() if ready else _open(file)
        if samples.layout == "gray and alpha":
            bit_depth.read_all_bits(image)
        return image

    if limits.judged:
        planes = [loaded(first, file)]
    else:
        planes = [first()]
        planes[0].load()
    if samples.layout == "colour":
        low = _open(file)
        bit_depth.read_low_bytes(low)
        low.load()
        planes.append(low)
    return planes


def _upright(
    planes: list[Image.Image], samples: bit_depth.Samples, orientation: int, box: Box | None
) -> Image.Image:
    """Decoded planes → upright, the box cut out, mode RGB, 8 bits."""
    turn = _UPRIGHT.get(orientation)
    if turn is not None:
        planes = [plane.transpose(turn) for plane in planes]
    if box is not None:
        planes = [_cut(plane, box) for plane in planes]
    picture = bit_depth.narrowed(planes, samples)
    if picture.mode == "LAB":
        raise ValueError("no conversion from LAB")
    return _opaque(picture)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 where there is none or it is unreadable (Pillow turns TIFF itself)."""
    if image.format == "TIFF":
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _opaque(image: Image.Image) -> Image.Image:
    """Any 8-bit mode → RGB, transparent parts on gray.

    An alpha that is the same everywhere says nothing, zero included: there is no picture of which
    all is to be hidden.
    """
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    least, most = layer.getchannel("A").getextrema()
    if least == most:
        return layer.convert("RGB")
    ground = Image.new("RGBA", layer.size, (_BACKGROUND, _BACKGROUND, _BACKGROUND, 255))
    return Image.alpha_composite(ground, layer).convert("RGB")


def _cut(image: Image.Image, box: Box) -> Image.Image:
    inside = (
        box.x >= 0
        and box.y >= 0
        and box.width > 0
        and box.height > 0
        and box.x + box.width <= image.width
        and box.y + box.height <= image.height
    )
    if not inside:
        raise PictureError(
            "box_outside",
            f"the box {','.join(map(str, box))} is not wholly inside the image of "
            f"{image.width}×{image.height} pixels",
            "give x,y,width,height after EXIF rotation",
        )
    return image.crop((box.x, box.y, box.x + box.width, box.y + box.height))


def _check_small(width: int, height: int, limits: ImageLimits) -> None:
    if width < limits.min_width or height < limits.min_height:
        raise PictureError(
            "image_too_small",
            f"the crop has {width}×{height} pixels, at least "
            f"{limits.min_width}×{limits.min_height} are needed",
            "send a larger one",
        )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
