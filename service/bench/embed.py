"""Images/s and latency of the embedder, against the plain fp32 eager module."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional

from model import CMT, load_checkpoint, preprocess
from model.benchmark import Spread, compare, publish
from model.outputs import ResultsFile
from service.bench.crops import decoded, image_files
from service.bench.data import CHECKPOINT, numbers
from service.bench.networks import NetworkOption, Weights, checkpoint_of, named
from service.embedding.embedder import Device, Embedder, Runtime
from service.images.decode import Crop


def embed(
    checkpoint: Weights = CHECKPOINT,
    network: NetworkOption = None,
    images: Annotated[Path, typer.Option(help="Folder of crops.")] = Path("examples"),
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="How often both sides run, in turn.")] = 5,
    device: Annotated[Device, typer.Option(help="auto, cpu or cuda.")] = "auto",
    runtime: Annotated[Runtime, typer.Option(help="auto, torch or openvino.")] = "auto",
    json: ResultsFile = None,
) -> None:
    """Time the service's embedder, preprocessing included, against the plain network in fp32.

    Example: cmt bench embed --network resnet50 --batches 1,32
    """
    settings = {
        **named(checkpoint, network),
        "images": str(images),
        "batches": batches,
        "rounds": rounds,
        "device": device,
        "runtime": runtime,
    }
    crops = decoded(image_files(images))
    with checkpoint_of(checkpoint, network) as path:
        embedder = Embedder(path, device, runtime)
        plain, _ = load_checkpoint(path, embedder.device)
        agreement = _agreement(embedder, plain, crops)
        rows: list[tuple[object, ...]] = []
        results: list[dict[str, object]] = []
        for batch in numbers(batches):
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
    """The obvious implementation: one batch through the module as it is."""
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
