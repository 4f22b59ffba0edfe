"""Decoded training images: resized once, kept as uint8 in a memory-mapped file.

A second run with the same images and size opens the file instead of decoding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from model.preprocess import resize
from training.datasets.sample import DatasetError, Sample


def readable_samples(
    samples: Sequence[Sample],
    height: int,
    width: int,
    folder: Path,
    unreadable: Literal["stop", "skip"] = "stop",
) -> tuple[list[Sample], list[str]]:
    """The samples that decode, and a sentence for each that does not.

    Raises DatasetError naming the file under "stop".
    """
    if unreadable == "stop":
        cached_images(samples, height, width, folder)
        return list(samples), []
    kept, sentences = [], []
    for sample in samples:
        try:
            _decode(sample.path, height, width)
            kept.append(sample)
        except DatasetError as error:
            sentences.append(str(error))
    return kept, sentences


def cached_images(samples: Sequence[Sample], height: int, width: int, folder: Path) -> np.ndarray:
    """uint8 array of len(samples)×3×height×width, memory-mapped read-only from `folder`.

    Raises DatasetError naming the file when an image cannot be decoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_key(samples, height, width)}.npy"
    if not path.is_file():
        partial = path.with_suffix(".partial")
        shape = (len(samples), 3, height, width)
        images = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for row, sample in enumerate(samples):
            images[row] = _decode(sample.path, height, width).transpose(2, 0, 1)
        images.flush()
        partial.replace(path)
    loaded: np.ndarray = np.load(path, mmap_mode="r")
    return loaded


def _decode(path: Path, height: int, width: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return resize(image, height, width)
    except (OSError, UnidentifiedImageError) as error:
        raise DatasetError(
            f"{path} cannot be decoded ({error}); replace it or remove it from the data set"
        ) from error


def _key(samples: Sequence[Sample], height: int, width: int) -> str:
    digest = hashlib.sha256(f"{height}x{width}".encode())
    for sample in samples:
        facts = sample.path.stat()
        digest.update(f"{sample.path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
