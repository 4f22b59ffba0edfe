"""Real features: the crops of folders in the layout of SYSU-MM01, embedded once and cached."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.image_files import find_images
from service.embedding.embedder import Embedder
from service.images.decode import Crop, Modality, decode

log = logging.getLogger(__name__)

_MODALITIES: dict[str, Modality] = {
    "cam1": "rgb", "cam2": "rgb", "cam3": "ir", "cam4": "rgb", "cam5": "rgb", "cam6": "ir"
}  # fmt: skip
_BATCH = 32


class BenchmarkDataError(Exception):
    """A benchmark's data is not available; the message says the remedy."""


class CropFeatures(NamedTuple):
    """M embedded crops. features: M×P×D fp16. persons: M numbers. infrared: M flags."""

    features: Tensor
    persons: Tensor
    infrared: Tensor

    def only(self, infrared: bool) -> CropFeatures:
        """The crops of one modality."""
        chosen = self.infrared == infrared
        return CropFeatures(*(column[chosen] for column in self))


def image_files(folder: Path) -> list[Path]:
    """All images under a folder, sorted. Raises BenchmarkDataError where there is none."""
    found = find_images(folder).images
    if not found:
        raise BenchmarkDataError(f"no image in the folder {folder}; give a folder of person crops")
    return found


def decoded(files: Sequence[Path]) -> list[Crop]:
    """Decode image files. Raises ServiceError."""
    return [decode(file.read_bytes()) for file in files]


def crop_files(roots: Sequence[Path]) -> list[Path]:
    """`camC/PPPP/*` of every root, by root and person. Raises BenchmarkDataError for none."""
    files = [
        file
        for root in roots
        for camera in _MODALITIES
        if (root / camera).is_dir()
        for file in find_images(root / camera).images
        if file.parents[2] == root
    ]
    if not files:
        raise BenchmarkDataError(
            f"no crop in {', '.join(map(str, roots))}; give folders with files camC/PPPP/FFFF.jpg"
        )
    return sorted(files, key=lambda file: (file.parents[2], file.parent.name, file))


def embedded(roots: Sequence[Path], embedder: Embedder, cache: Path | None) -> CropFeatures:
    """Features of all crops. cache: a file to keep them in; one of other crops is overwritten.

    Persons of two roots are different ones, whatever their numbers. Raises BenchmarkDataError.
    """
    files = crop_files(roots)
    names = "\n".join("/".join(file.parts[-4:]) for file in files)
    source = hashlib.sha256(f"{embedder.info.fingerprint}\n{names}".encode()).hexdigest()
    cached = _read(cache, source) if cache is not None else None
    if cached is not None:
        return cached
    crops = CropFeatures(
        features_of(files, embedder).half(),
        torch.tensor(person_numbers(files)),
        torch.tensor([modality_of(file) == "ir" for file in files]),
    )
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file(crops._asdict(), cache, {"source": source})
    return crops


def features_of(files: Sequence[Path], embedder: Embedder) -> Tensor:
    """M crops, each of its camera's modality → M×P×D fp32, in their order."""
    blocks = []
    for start in track(range(0, len(files), _BATCH), "Embedding crops", transient=True):
        block = files[start : start + _BATCH]
        crops = [decode(file.read_bytes(), modality=modality_of(file)) for file in block]
        blocks.append(embedder.embed(crops))
    return torch.cat(blocks)


def person_numbers(files: Sequence[Path]) -> list[int]:
    """0, 1, … for each person of each root, in the order of the files."""
    folders = [(file.parents[2], file.parent.name) for file in files]
    numbers = {folder: number for number, folder in enumerate(dict.fromkeys(folders))}
    return [numbers[folder] for folder in folders]


def modality_of(file: Path) -> Modality:
    """The modality of a crop, by its camera's folder."""
    return _MODALITIES[file.parents[1].name]


def _read(cache: Path, source: str) -> CropFeatures | None:
    if not cache.exists():
        return None
    try:
        with safe_open(cache, framework="pt") as file:
            if (file.metadata() or {}).get("source") == source:
                return CropFeatures(*(file.get_tensor(name) for name in CropFeatures._fields))
    except SafetensorError as error:
        raise BenchmarkDataError(
            f"{cache} is no cache of features ({error}); delete it, or name another file"
        ) from error
    log.info("%s holds features of other crops; it is written anew", cache)
    return None
