"""The real images that an export is checked on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import CMTConfig, Modality
from model.config import MODALITIES
from model.csv_table import read_table
from model.image_files import why_unusable
from model.pixels import normalise
from training.datasets import LAYOUTS, DatasetError, DatasetName, Sample
from training.image_cache import cached_images

EXAMPLES = Path(__file__).parents[2] / "examples"  # there in a clone of the repository only
MANIFEST = "manifest.csv"
LEAST = 10  # of a modality, so that there is a top-10 and a batch of eight
MOST = 48  # of a modality: enough to tell a wrong graph, and seconds for a large network


def parity_images(folder: Path | None, config: CMTConfig) -> dict[Modality, Tensor]:
    """Up to `MOST` images of each modality, preprocessed: N×3×H×W, spread evenly over the folder.

    folder: see `chosen_images`. Raises what that raises, and DatasetError for an image that cannot
    be decoded.
    """
    return {
        modality: preprocessed(samples, config)
        for modality, samples in chosen_images(folder, MOST).items()
    }


def chosen_images(folder: Path | None, most: int) -> dict[Modality, list[Sample]]:
    """Up to `most` images of each modality, spread evenly over a folder.

    folder: crops with a `manifest.csv` as in `examples/` (columns file and modality), or in
        the `folder` layout (`rgb/<person>/…`, `ir/<person>/…`). None: `examples/` itself.
    Raises DatasetError where there is no folder, it is in neither form, or it has too few images
    of a modality.
    """
    if folder is None:
        folder = EXAMPLES
        if not (folder / MANIFEST).is_file():
            raise DatasetError(
                "The export is checked on real images, and examples/ lies in a clone of the "
                "repository only; give --images FOLDER with visible and infrared crops."
            )
    if (folder / MANIFEST).is_file():
        samples = _listed(folder / MANIFEST)
    else:
        samples = LAYOUTS[DatasetName.FOLDER].test(folder)  # everyone
    return {modality: _spread(samples, modality, folder, most) for modality in MODALITIES}


def preprocessed(samples: Sequence[Sample], config: CMTConfig) -> Tensor:
    """N×3×H×W, as the network takes them. Raises DatasetError for what cannot be decoded."""
    with tempfile.TemporaryDirectory() as cache:
        pixels = cached_images(samples, config.input_height, config.input_width, Path(cache))
        return normalise(torch.from_numpy(np.array(pixels)))


def _listed(manifest: Path) -> list[Sample]:
    table = read_table(manifest, ("file", "modality"))
    samples = []
    for line, row in table.rows:
        modality = row["modality"]
        if not row["file"] or modality not in MODALITIES:
            table.problems.append(f"line {line} names no file or no modality (rgb or ir)")
            continue
        path = manifest.parent / row["file"]
        reason = why_unusable(path)
        if reason is not None:
            table.problems.append(f"line {line}: {path}: {reason}; restore it or its line")
        samples.append(Sample(path, 0, 0, modality))
    if table.problems:
        raise DatasetError(
            f"Expected the columns file and modality in every line of {manifest}: "
            f"{'; '.join(table.problems)}."
        )
    return samples


def _spread(samples: Sequence[Sample], modality: Modality, folder: Path, most: int) -> list[Sample]:
    found = [sample for sample in samples if sample.modality == modality]
    if len(found) < LEAST:
        word = "visible" if modality == "rgb" else "infrared"
        raise DatasetError(
            f"Expected at least {LEAST} {word} images in {folder} to check the export on, but "
            f"there are {len(found)}; add some, or give another folder with --images."
        )
    places = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[place] for place in places]
