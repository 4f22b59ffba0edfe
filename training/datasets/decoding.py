"""One file of a dataset → the picture that the network is given, or why there is none."""

import os
from pathlib import Path

from PIL import Image

from model import Modality
from model.pictures import ImageLimits, PictureError, read

# Threads that decode: Pillow works outside Python's lock, and some of them wait for the disk.
READERS = 2 * (os.cpu_count() or 2)

# A dataset is its user's own: any size goes.
_LIMITS = ImageLimits(max_bytes=1 << 40, max_pixels=1 << 40, min_width=1, min_height=1)


class UnreadableImageError(ValueError):
    """A file that is no picture, or not all of one; the message is the reason."""


def decode(path: Path, modality: Modality) -> Image.Image:
    """The picture of a file, as the service would embed it: mode RGB, upright.

    Raises UnreadableImageError where there is no such file, or the service would refuse what is
    in it: an unknown format, damage, missing pixels, several frames, one shade.
    """
    try:
        return read(path.read_bytes(), modality=modality, limits=_LIMITS).image
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    except PictureError as error:
        raise UnreadableImageError(error.reason) from error
