"""Images/s and latency of the embedder, against the plain fp32 eager module."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional

from model import CMT, load_checkpoint, preprocess, save_checkpoint
from model.benchmark import Comparison, Spread, compare, publish
from model.benchmark_table import Headline, as_fast, duration
from model.device import DEVICES
from model.outputs import ResultsFile
from service.bench.crops import decoded, image_files
from service.bench.data import CHECKPOINT, numbers
from service.bench.networks import NetworkOption, Weights, checkpoint_of, named
from service.embedding.embedder import Embedder
from service.embedding.verdict import Runtime
from service.images.decode import Crop

QUICK = ("--rounds", "3")


def embed(
    checkpoint: Weights = CHECKPOINT,
    network: NetworkOption = None,
    images: Annotated[Path, typer.Option(help="Folder of crops.")] = Path("examples"),
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(help="How often both sides run, in turn.")] = 5,
    device: Annotated[str, typer.Option(help=f"{DEVICES}.")] = "auto",
    runtime: Annotated[Runtime, typer.Option(help="auto, torch, openvino or int8.")] = "auto",
    json: ResultsFile = None,
) -> None:
    """Time the service's embedder, preprocessing included, against the plain network in fp32.

    A checkpoint that also embeds each crop's mirror image is timed without it, too (not in int8,
    which was written for both), and what a lone crop takes longer for it.

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
    rows: list[tuple[object, ...]] = []
    results: list[dict[str, object]] = []
    with ExitStack() as stack:
        path = stack.enter_context(checkpoint_of(checkpoint, network))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        embedders: dict[int, Embedder] = {}
        for views, file in _by_views(path, folder):
            if runtime == "int8" and file != path:
                continue
            embedder = stack.enter_context(closing(Embedder(file, device, runtime)))
            embedders[views] = embedder
            plain, _ = load_checkpoint(file, embedder.device)
            agreement = _agreement(embedder, plain, crops)
            for batch in numbers(batches):
                time = _compared(embedder, plain, list(islice(cycle(crops), batch)), rounds)
                seconds = (time.ours.median, time.ours.most, time.ours.least)
                rate = Spread(*(batch / s for s in seconds))
                results.append(
                    {
                        "batch": batch,
                        "views": views,
                        "runtime": embedder.runtime,
                        "precision": embedder.precision,
                        "images per second": rate,
                        "seconds": time,
                        **agreement,
                    }
                )
                rows.append(
                    (batch, views, embedder.runtime, rate, time.ours, time.theirs, time.ratio)
                )
            shares = (f"{name}: {share:.4f}" for name, share in agreement.items())
            rows.append(("", views, embedder.precision, *shares, "", ""))
        if len({embedder.runtime for embedder in embedders.values()}) < len(embedders):
            one, two = (embedders[views] for views in (1, 2))
            lone = crops[:1]
            time = compare(lambda: one.embed(lone), lambda: two.embed(lone), 10 * rounds)
            longer = f"a crop and its mirror image takes {time.ratio} × as long as a crop"
            rows.append((1, "2 to 1", one.runtime, longer, "", "", ""))
            results.append({"views": "2 to 1", "runtime": one.runtime, "times as long": time.ratio})
    columns = ("batch", "views", "runtime", "images/s", "ours, s", "eager fp32, s", "times faster")
    publish("embed", settings, columns, rows, results, json)


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`."""
    network = report["settings"].get("network", "the demo's network")
    for result in report["results"]:
        if "batch" not in result:  # what the mirror image costs has no rival
            continue
        views = "a crop" if result.get("views", 1) == 1 else "a crop and its mirror image"
        yield Headline(
            f"embedding, {network}, {views}, batch of {result['batch']}",
            duration(result["seconds"]["ours"]),
            "eager PyTorch in fp32",
            duration(result["seconds"]["theirs"]),
            as_fast(result["seconds"]["ratio"]),
        )


def _by_views(checkpoint: Path, folder: Path) -> Iterator[tuple[int, Path]]:
    """Files by the views of a crop that they embed: the mirror image is one of two."""
    model, _ = load_checkpoint(checkpoint)
    yield 1 + model.config.mirror, checkpoint
    if model.config.mirror:
        single = CMT(model.config.model_copy(update={"mirror": False}))
        single.load_state_dict(model.state_dict())
        save_checkpoint(folder / "single.safetensors", single)
        yield 1, folder / "single.safetensors"


def _compared(embedder: Embedder, plain: CMT, crops: Sequence[Crop], rounds: int) -> Comparison:
    _plain(plain, crops), embedder.embed(crops)
    return compare(lambda: embedder.embed(crops), lambda: _plain(plain, crops), rounds)


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
