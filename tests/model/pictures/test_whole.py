from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from model.pictures import ImageLimits, PictureError, read

_END = b"\xff\xd9"
_ANY = ImageLimits(min_width=1, min_height=1)
_WAYS: list[dict[str, Any]] = [
    {"subsampling": "4:4:4"},
    {"subsampling": "4:2:2", "quality": 30},
    {"subsampling": "4:2:0", "optimize": True},
    {"restart_marker_blocks": 2},
    {"restart_marker_rows": 1, "subsampling": "4:2:0"},
    {"progressive": True},
]


def scene(mode: str, width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    cells = random.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    smooth = Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR)
    grain = random.integers(0, 40, (height, width, 3), dtype=np.uint8)
    return ImageChops.add(smooth, Image.fromarray(grain)).convert(mode)


@pytest.mark.parametrize("way", _WAYS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_accepted_whole_and_refused_without_its_last_bytes(
    mode: str, way: dict[str, Any]
) -> None:
    for width, height in ((48, 64), (37, 83), (7, 40)):  # in and beyond whole blocks
        file = io.BytesIO()
        scene(mode, width, height).save(file, "JPEG", **way)
        whole = file.getvalue()
        assert read(whole, limits=_ANY).upright.size == (width, height)
        for missing in (9, 20, 40):
            with pytest.raises(PictureError) as refused:
                read(whole[: -missing - len(_END)] + _END, limits=_ANY)
            assert refused.value.kind == "image_truncated"


def test_a_jpeg_that_ends_in_gray_is_accepted() -> None:
    picture = scene("RGB", 48, 64)
    picture.paste((128, 128, 128), (0, 32, 48, 64))  # what a decoder shows in place of missing data
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    assert read(file.getvalue()).upright.getpixel((47, 63)) == (128, 128, 128)
