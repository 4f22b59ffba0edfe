"""Images/s and latency of the embedder, against the plain fp32 eager module."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor
from torch.nn import functional

from model import CMT, CMTConfig, load_checkpoint, preprocess, save_checkpoint
from model.benchmark import Spread, compare, publish
from service.embedder import Device, Embedder, Runtime
from service.images import Crop, decode

Backbone = Literal["resnet18", "resnet34", "resnet50"]

_IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def embed(
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A checkpoint; without one, ResNet-50 at 384×144, random weights."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of crops; without one, made-up pictures.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="How often both sides run, in turn.")] = 5,
    device: Annotated[Device, typer.Option(help="auto, cpu or cuda.")] = "auto",
    runtime: Annotated[Runtime, typer.Option(help="auto, torch or openvino.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
) -> None:
    """Time the service's embedder, preprocessing included, against the plain network in fp32.

    Example: cmt bench embed --checkpoint examples/demo.safetensors --images examples
    """
    settings = {
        "checkpoint": str(checkpoint) if checkpoint else "random",
        "images": str(images) if images else "random",
        "batches": batches,
        "rounds": rounds,
        "device": device,
        "runtime": runtime,
    }
    crops = _random_crops(32) if images is None else _read_crops(images)
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint or random_checkpoint(Path(folder))
        embedder = Embedder(path, device, runtime)
        plain, _ = load_checkpoint(path, embedder.device)
        agreement = _agreement(embedder, plain, crops)
        rows: list[tuple[object, ...]] = []
        results: list[dict[str, object]] = []
        for batch in map(int, batches.split(",")):
            chosen = list(islice(cycle(crops), batch))
            _plain(plain, chosen), embedder.embed(chosen)
            time = compare(
                lambda chosen=chosen: embedder.embed(chosen),  # type: ignore[misc]
                lambda chosen=chosen: _plain(plain, chosen),  # type: ignore[misc]
                rounds,
            )
            rate = Spread(*(batch / s for s in (time.ours.median, time.ours.most, time.ours.least)))
            results.append(
                {
                    "batch": batch,
                    "runtime": embedder.runtime,
                    "precision": embedder.precision,
                    "images per second": rate,
                    "seconds": time,
                    **agreement,
                }
            )
            rows.append((batch, embedder.runtime, rate, time.ours, time.theirs, time.ratio))
        embedder.close()
    columns = ("batch", "runtime", "images/s", "ours, s", "eager fp32, s", "times faster")
    rows.append(("", embedder.precision, *(f"{k}: {v:.4f}" for k, v in agreement.items()), "", ""))
    publish("embed", settings, columns, rows, results, json)


@torch.inference_mode()
def _plain(model: CMT, crops: Sequence[Crop]) -> Tensor:
    """What somebody writes first: one batch through the module, as it is."""
    images = torch.stack([preprocess(crop.image, model.config) for crop in crops])
    device = next(model.parameters()).device
    features: Tensor = model.embed(images.to(device), [crop.modality for crop in crops])
    return features.cpu()


def _agreement(embedder: Embedder, plain: CMT, crops: Sequence[Crop]) -> dict[str, float]:
    """Lowest cosine with the plain module's features, and share of equal nearest neighbours."""
    ours = embedder.embed(crops).flatten(1)
    blocks = [_plain(plain, crops[start : start + 32]) for start in range(0, len(crops), 32)]
    theirs = torch.cat(blocks).flatten(1)
    nearest = [
        torch.cdist(f.double(), f.double()).fill_diagonal_(torch.inf).argmin(1)
        for f in (ours, theirs)
    ]
    return {
        "lowest cosine": float(functional.cosine_similarity(ours, theirs).min()),
        "same nearest": float((nearest[0] == nearest[1]).double().mean()),
    }


def random_checkpoint(folder: Path, backbone: Backbone = "resnet50") -> Path:
    """Untrained weights in the paper's size, for measuring time only → the file."""
    torch.manual_seed(0)
    path = folder / "random.safetensors"
    save_checkpoint(path, CMT(CMTConfig(backbone=backbone)))
    return path


def _random_crops(count: int) -> list[Crop]:
    """Pictures of coarse blocks, every second one gray, at the size of a usual crop."""
    rng = np.random.default_rng(0)
    crops = []
    for i in range(count):
        blocks = rng.integers(0, 256, (12, 5, 1 if i % 2 else 3)).astype(np.uint8)
        image = Image.fromarray(np.repeat(blocks, 3 if i % 2 else 1, axis=2)).resize((96, 256))
        crops.append(_crop_of(image))
    return crops


def _crop_of(image: Image.Image) -> Crop:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return decode(buffer.getvalue())


def _read_crops(folder: Path) -> list[Crop]:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _IMAGE_FILES)
    if not files:
        raise ValueError(f"no image in {folder}; give a folder of person crops")
    return [decode(file.read_bytes()) for file in files]
