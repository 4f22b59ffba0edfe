"""Measure how well visible and infrared pictures are told apart, and blank ones from dark ones.

Infrared crops of a set in the layout of SYSU-MM01 are tinted, drawn upon and colored by palettes;
visible ones are dulled, darkened, cast and drawn upon; all are saved by several codecs, every
second one at 64×128. The table counts those taken for the other modality, in percent. Settings were
chosen on the people of even numbers; the table is of those of odd numbers (`--half`).

Example: OPENBLAS_NUM_THREADS=1 python scripts/modality_table.py --root synth-sysu-val-b --every 10
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import count, repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from model.machine import machine
from model.pictures import PictureError, read

Pixels = npt.NDArray[np.float64]
Change = Callable[[Pixels, np.random.Generator], Pixels]

VISIBLE, INFRARED = (1, 2, 4, 5), (3, 6)
GREEN, YELLOW, RED, WHITE = (0, 255, 0), (255, 255, 0), (255, 0, 0), (255, 255, 255)
TEXTS = ("person 0.93", "2026-11-29 13:24:05", "CAM 3 IR", "ID 42")

CODECS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG"},
    "JPEG 95": {"format": "JPEG", "quality": 95, "subsampling": 2},
    "JPEG 75": {"format": "JPEG", "quality": 75, "subsampling": 2},
    "JPEG 75 4:4:4": {"format": "JPEG", "quality": 75, "subsampling": 0},
    "JPEG 50": {"format": "JPEG", "quality": 50, "subsampling": 2},
    "JPEG 30": {"format": "JPEG", "quality": 30, "subsampling": 2},
    "WebP 75": {"format": "WEBP", "quality": 75},
    "WebP 30": {"format": "WEBP", "quality": 30},
}

BLACK = (0, 0, 0)
# Colors from cold to hot, evenly spaced, as hexadecimal digits.
PALETTES = {
    "ironbow": "000000 20006e 78009b c8286e eb5a14 faa000 ffdc3c ffffe6",
    "rainbow": "000050 0000ff 00c8ff 00dc3c e6e600 ff7800 dc0000",
    "lava": "000000 14285a 1e6e6e 78285a dc281e fab428 ffffff",
    "arctic": "00003c 0050c8 3cbee6 aaaaaa e6aa3c ffe696",
    "jet": "000080 0000ff 00ffff ffff00 ff0000 800000",
    "inferno": "000004 420a68 932667 dd513a fca50a fcffa4",
    "viridis": "440154 3b528b 21918c 5ec962 fde725",
    "glowbow": "000000 3c0000 961400 e65a0a ffbe3c ffffff",
    "rainbow HC": "000000 6e006e 1e1edc 00bebe 00b41e dcdc00 e63c14 ffc8c8 ffffff",
    "gray, hot in red": "000000 3c3c3c 808080 c8c8c8 ff3c00 ffdc00",
}


def tint(*factors: float) -> Change:
    """Multiply the channels."""
    return lambda pixels, _: pixels * np.array(factors)


def offset(*levels: float) -> Change:
    """Add to the channels."""
    return lambda pixels, _: pixels + np.array(levels)


def noise(deviation: float) -> Change:
    """Independent on every channel."""
    return lambda pixels, dice: pixels + dice.normal(0, deviation, pixels.shape)


def dull(saturation: float) -> Change:
    """Move the colors towards gray."""

    def change(pixels: Pixels, _: np.random.Generator) -> Pixels:
        gray = (pixels @ (0.299, 0.587, 0.114))[..., None]
        return np.asarray(gray + saturation * (pixels - gray))

    return change


def palette(name: str) -> Change:
    """Color the stretched gray values."""

    colors = np.array([list(bytes.fromhex(color)) for color in PALETTES[name].split()])
    steps = np.arange(len(colors))

    def change(pixels: Pixels, _: np.random.Generator) -> Pixels:
        gray = pixels[..., 0]
        low, high = np.percentile(gray, (1, 99))
        place = (gray - low) / max(high - low, 1) * steps[-1]
        return np.stack([np.interp(place, steps, channel) for channel in colors.T], axis=2)

    return change


def frame(color: tuple[int, int, int], width: int) -> Change:
    """Draw a detector's box along the edges."""

    def change(pixels: Pixels, dice: np.random.Generator) -> Pixels:
        image, inset = _image(pixels), int(dice.integers(0, 3))
        corners = (inset, inset, image.width - 1 - inset, image.height - 1 - inset)
        ImageDraw.Draw(image).rectangle(corners, outline=color, width=width)
        return np.asarray(image, dtype=np.float64)

    return change


def text(color: tuple[int, int, int], ground: tuple[int, int, int] | None = None) -> Change:
    """Write a line at the top."""

    def change(pixels: Pixels, dice: np.random.Generator) -> Pixels:
        image, font = _image(pixels), ImageFont.load_default(10)
        draw, line = ImageDraw.Draw(image), str(dice.choice(TEXTS))
        if ground is not None:
            draw.rectangle(draw.textbbox((1, 1), line, font=font), fill=ground)
        draw.text((1, 1), line, fill=color, font=font)
        return np.asarray(image, dtype=np.float64)

    return change


def both(first: Change, second: Change) -> Change:
    """One after the other."""
    return lambda pixels, dice: second(first(pixels, dice), dice)


AS_IS: Change = tint(1)
INFRARED_CHANGES: dict[str, Change] = {
    "as it is": AS_IS,
    "noise of 2 levels": noise(2),
    "noise of 4 levels": noise(4),
    "purple 3 %": tint(1.03, 0.985, 1.03),
    "purple 6 %": tint(1.06, 0.97, 1.06),
    "purple 12 %": tint(1.12, 0.94, 1.12),
    "purple 25 %": tint(1.25, 0.875, 1.25),
    "warm 10 %": tint(1.1, 1, 0.9),
    "cold 10 %": tint(0.9, 1, 1.1),
    "green 10 %": tint(0.9, 1.1, 0.9),
    "offset 8, 0, 8": offset(8, 0, 8),
    "offset 20, 0, −10": offset(20, 0, -10),
    "sepia": tint(1.07, 0.86, 0.67),
    "green phosphor": tint(0.1, 1, 0.15),
    "green box, 2 px": frame(GREEN, 2),
    "red box, 1 px": frame(RED, 1),
    "yellow box, 3 px": frame(YELLOW, 3),
    "yellow text": text(YELLOW),
    "white on green label": text(WHITE, (0, 160, 0)),
    "green box and label": both(frame(GREEN, 2), text(BLACK, GREEN)),
    "purple 6 %, green box": both(tint(1.06, 0.97, 1.06), frame(GREEN, 2)),
    "purple 6 %, noise of 2": both(tint(1.06, 0.97, 1.06), noise(2)),
    "sepia, yellow text": both(tint(1.07, 0.86, 0.67), text(YELLOW)),
    **{f"palette {name}": palette(name) for name in PALETTES},
}
VISIBLE_CHANGES: dict[str, Change] = {
    "as it is": AS_IS,
    "half as saturated": dull(0.5),
    "a third as saturated": dull(0.33),
    "half as bright": tint(0.5),
    "a fifth as bright": tint(0.2),
    "warm 10 %": tint(1.1, 1, 0.9),
    "warm 25 %": tint(1.25, 1, 0.75),
    "cold 15 %": tint(0.9, 1, 1.15),
    "purple 12 %": tint(1.12, 0.94, 1.12),
    "offset 10, 0, −8": offset(10, 0, -8),
    "green box, 2 px": frame(GREEN, 2),
    "white on green label": text(WHITE, (0, 160, 0)),
    "yellow text": text(YELLOW),
}


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _outcome(path: Path, modality: str, change: str, codec: str, seed: int) -> str:
    """What a changed and saved picture is taken for: rgb, ir, or the kind of its refusal."""
    image = Image.open(path).convert("RGB")
    if seed % 2:
        image = image.resize((64, 128), Image.Resampling.BILINEAR)
    changes = INFRARED_CHANGES if modality == "ir" else VISIBLE_CHANGES
    pixels = changes[change](np.asarray(image, dtype=np.float64), np.random.default_rng(seed))
    saved = io.BytesIO()
    _image(pixels).save(saved, **CODECS[codec])
    try:
        return read(saved.getvalue()).modality
    except PictureError as error:
        return error.kind


def _pictures(root: Path, cameras: tuple[int, ...], half: int, every: int) -> list[Path]:
    found = [
        path
        for camera in cameras
        for path in sorted((root / f"cam{camera}").glob("*/*.jpg"))
        if int(path.parent.name) % 2 == half
    ]
    return found[::every]


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--half", type=int, choices=(0, 1), default=1, help="people by parity")
    parser.add_argument("--every", type=int, default=1, help="take every n-th picture")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    print(json.dumps(machine()))
    with ProcessPoolExecutor(options.processes) as pool:
        for modality, cameras, changes in (
            ("ir", INFRARED, INFRARED_CHANGES),
            ("rgb", VISIBLE, VISIBLE_CHANGES),
        ):
            paths = _pictures(options.root, cameras, options.half, options.every)
            name = {"ir": "infrared", "rgb": "visible"}[modality]
            print(f"\n| {len(paths)} {name} crops | {' | '.join(CODECS)} |")
            print("|---" * (1 + len(CODECS)) + "|")
            refused = 0
            for change in changes:
                cells = []
                for codec in CODECS:
                    of = (repeat(modality), repeat(change), repeat(codec), count())
                    outcomes = list(pool.map(_outcome, paths, *of, chunksize=16))
                    refused += sum(outcome.startswith("image_") for outcome in outcomes)
                    wrong = sum(outcome in {"rgb", "ir"} - {modality} for outcome in outcomes)
                    cells.append(f"{100 * wrong / len(paths):.1f}")
                print(f"| {change} | {' | '.join(cells)} |", flush=True)
            print(f"\nRefused as blank: {refused}")


if __name__ == "__main__":
    main()
