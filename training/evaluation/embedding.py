"""Samples on disk → what the network computes for them, on the CPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model import CMT, CMTConfig, Modality, preprocess
from training.datasets import DatasetError, Sample
from training.datasets.decoding import UnreadableImageError, decode


@dataclass(frozen=True)
class Embedded:
    """N samples with their features, each N×P×D float32 on the CPU.

    samples: in the order of the features.
    features: raw part features F.
    compensated: F̂ of the modality that an image lacks; None without modality alignment.
    embedding: the representation that is ranked.
    """

    samples: Sequence[Sample]
    features: Tensor
    compensated: Tensor | None
    embedding: Tensor


class _Crops(Dataset[tuple[Tensor | DatasetError, Modality]]):
    """An image that does not decode is handed on as its error: a worker process that raises buries
    the sentence under its own traceback."""

    def __init__(self, samples: Sequence[Sample], config: CMTConfig) -> None:
        self.samples = samples
        self.config = config

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor | DatasetError, Modality]:
        sample = self.samples[index]
        try:
            return preprocess(decode(sample.path, sample.modality), self.config), sample.modality
        except UnreadableImageError as error:
            sentence = f"{sample.path} cannot be decoded ({error}); replace it or remove it"
            return DatasetError(f"{sentence} from the dataset."), sample.modality


@torch.inference_mode()
def embed_samples(
    model: CMT,
    samples: Sequence[Sample],
    *,
    batch_size: int = 64,
    workers: int = 0,
    mirror: bool | None = None,
) -> Embedded:
    """Run the network over all samples, on the device it is on, in evaluation mode and fp32.

    batch_size: images per forward pass.
    workers: processes that decode images; 0 decodes in this one.
    mirror: whether to take the mean with the mirror image; None: as the configuration says.
    Raises DatasetError where an image cannot be decoded; it is named.
    """
    device = next(model.parameters()).device
    loader = DataLoader(
        _Crops(samples, model.config),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    features, compensated, embedding = [], [], []
    with _evaluating(model, mirror):
        for images, modalities in loader:
            if isinstance(images, DatasetError):
                raise images
            output = model.represent(images.to(device, non_blocking=True), modalities)
            features.append(output.features.float().cpu())
            embedding.append(output.embedding.float().cpu())
            if output.compensated is not None:
                compensated.append(output.compensated.float().cpu())
    return Embedded(
        samples=samples,
        features=torch.cat(features),
        compensated=torch.cat(compensated) if compensated else None,
        embedding=torch.cat(embedding),
    )


@contextmanager
def _evaluating(model: CMT, mirror: bool | None) -> Iterator[None]:
    """Running statistics instead of the batch's, mirror as asked; afterwards all as it was."""
    was_training, config = model.training, model.config
    model.eval()
    if mirror is not None:
        model.config = config.model_copy(update={"mirror": mirror})
    try:
        yield
    finally:
        model.train(was_training)
        model.config = config


def _collate(
    batch: list[tuple[Tensor | DatasetError, Modality]],
) -> tuple[Tensor | DatasetError, list[Modality]]:
    images = []
    for image, _ in batch:
        if isinstance(image, DatasetError):
            return image, []
        images.append(image)
    return torch.stack(images), [modality for _, modality in batch]
