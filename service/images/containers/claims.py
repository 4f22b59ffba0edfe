"""The refusals of files that claim too much, and the bounds that formats share."""

from __future__ import annotations

from service.errors import ImageMultiFrame, ImageTooComplex, ImageTooLarge

# Parts of one file. A camera's has some dozens; image data in parts of 8 KB makes 2,500 of 20 MB.
MOST_PARTS = 20_000
# Of a decompressed color profile or text. CMYK profiles have about half of it.
MOST_UNPACKED = 1 << 20


def too_complex(what: str) -> ImageTooComplex:
    """The error of a file that costs far more to decode than its pixels do. what: it has."""
    return ImageTooComplex(f"the image has {what}; save it again as an ordinary JPEG or PNG")


def check_parts(count: int) -> None:
    """Raises ImageTooComplex."""
    if count > MOST_PARTS:
        raise too_complex(f"more than {MOST_PARTS:,} parts")


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse a canvas that is allocated before its size can be asked for. Raises ImageTooLarge."""
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width * height:,} pixels, the limit is {max_pixels:,}; "
            "send a smaller crop"
        )


def several_frames() -> ImageMultiFrame:
    """The error of an animation, or of a file of several pages."""
    return ImageMultiFrame("the image has several frames or pages; send one of them")
