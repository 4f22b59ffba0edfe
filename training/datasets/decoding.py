"""One file of a dataset → a decoded image, or why it is none."""

import os
from pathlib import Path

from PIL import Image

from training.datasets.sample import IMAGE_FORMATS

# Threads that decode: Pillow works outside Python's lock, and some of them wait for the disk.
READERS = 2 * (os.cpu_count() or 2)


class UnreadableImageError(ValueError):
    """A file that is no image that can be decoded to its last row; the message is the reason."""


def decode(path: Path) -> Image.Image:
    """The image of a file, decoded to its last row.

    Raises UnreadableImageError where there is no such file, it is of no known format, damaged or
    truncated.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.load()
            return image
    except MemoryError:
        raise
    except Exception as error:  # which kinds Pillow raises for damaged files differs by format
        if isinstance(error, OSError) and error.strerror:
            raise UnreadableImageError(error.strerror) from error
        # Pillow's sentence repeats the path for a file of no known format.
        reason = str(error).replace(repr(str(path)), "file") or type(error).__name__
        raise UnreadableImageError(reason) from error
