"""Part classifiers: imprinted ones are nearest-mean classifiers and know people at once."""

from __future__ import annotations

from math import log

import numpy as np
import torch

from model import CMT, CMTConfig, Modality
from training.classifiers import PartClassifiers, imprint
from training.losses import identity_loss


def people(count: int, each: int) -> tuple[np.ndarray, list[int], list[Modality]]:
    """Images whose colour blocks depend on the person. All visible: the stems are untrained."""
    images, labels = [], []
    modalities: list[Modality] = []
    for person in range(count):
        blocks = np.random.default_rng(person).integers(0, 200, (3, 4, 2))
        for shot in range(each):
            noise = np.random.default_rng((person, shot)).integers(0, 50, (3, 4, 2))
            images.append((blocks + noise).repeat(24, 1).repeat(24, 2).astype(np.uint8))
            labels.append(person)
            modalities.append("rgb")
    return np.stack(images), labels, modalities


def test_taken_means_make_the_nearest_mean_win() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 3, 8, generator=generator)
    features = torch.randn(20, 3, 8, generator=generator)
    classifiers = PartClassifiers(3, 8, 5)
    classifiers.take_means(means, 0.5)
    logits = classifiers(features)
    distances = (features[:, :, None] - means.transpose(0, 1)[None]).square().sum(-1)  # B×P×C
    expected = torch.log_softmax(-0.5 * distances, 2)
    assert torch.allclose(torch.log_softmax(logits, 2), expected, atol=1e-5)


def test_imprinted_classifiers_know_people_whom_random_ones_do_not(tiny_config: CMTConfig) -> None:
    torch.manual_seed(0)
    model = CMT(tiny_config)
    images, labels, modalities = people(12, each=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classifiers = PartClassifiers(tiny_config.parts, tiny_config.dim, 12)
    returned = imprint({"complete": classifiers}, model, images, labels, modalities)
    assert returned["complete"] < 0.7 * log(12)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    model.eval()
    pixels = torch.from_numpy(images).float().div(255).sub(0.45).div(0.225)
    with torch.no_grad():
        loss = (
            identity_loss(classifiers(model(pixels, modalities).complete), torch.tensor(labels))
            / tiny_config.parts
        )
    assert loss < 0.7 * log(12)
