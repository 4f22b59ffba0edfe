"""Each loss against the loops of its equation, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from model import Modulation, modulate
from training.losses import (
    ModulationForm,
    hetero_centre_triplet,
    identity_loss,
    modality_centres,
    modality_consistency,
    modulation_discriminative,
)

LABELS = torch.tensor([4, 4, 9, 9, 2, 2, 4, 4, 9, 9, 2, 2])
IS_IR = torch.tensor([False] * 6 + [True] * 6)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rows_of(label: int, ir: bool) -> list[int]:
    return [i for i in range(12) if LABELS[i] == label and IS_IR[i].item() == ir]


def centre(features: torch.Tensor, label: int, ir: bool) -> list[float]:
    rows = [features[i].flatten().tolist() for i in rows_of(label, ir)]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def test_identity_loss_is_cross_entropy_summed_over_parts() -> None:
    logits, labels = draw(4, 3, 5), torch.tensor([0, 3, 3, 1])
    expected = 0.0
    for part in range(3):
        for sample in range(4):
            scores = logits[sample, part].tolist()
            log_total = math.log(sum(math.exp(s) for s in scores))
            expected += (log_total - scores[labels[sample]]) / 4
    assert identity_loss(logits, labels).item() == pytest.approx(expected)
    assert identity_loss(torch.zeros(4, 3, 5), labels).item() == pytest.approx(3 * math.log(5))
    # Equation (10) adds the means over the visible and over the infrared half.
    halves = identity_loss(logits[:2], labels[:2]) + identity_loss(logits[2:], labels[2:])
    assert halves.item() == pytest.approx(2 * expected)


def test_centres_are_equation_6() -> None:
    features = draw(12, 7)
    centres = modality_centres(features, LABELS, IS_IR)
    assert centres.labels.tolist() == [2, 4, 9]
    for row, label in enumerate([2, 4, 9]):
        assert centres.rgb[row].tolist() == pytest.approx(centre(features, label, False))
        assert centres.ir[row].tolist() == pytest.approx(centre(features, label, True))


def test_hetero_centre_triplet_is_equation_11_over_all_centres() -> None:
    features, margin = draw(12, 7), 5.0
    centres = {(p, ir): centre(features, p, ir) for p in (2, 4, 9) for ir in (False, True)}
    terms = []
    for (person, ir), anchor in centres.items():
        positive = math.dist(anchor, centres[person, not ir])
        negative = min(math.dist(anchor, c) for (p, _), c in centres.items() if p != person)
        terms.append(max(0.0, margin + positive - negative))
    expected = sum(terms) / len(terms)
    assert expected > 0
    assert hetero_centre_triplet(features, LABELS, IS_IR, margin).item() == pytest.approx(expected)


def test_modality_consistency_is_equations_7_and_8() -> None:
    compensated, features = draw(12, 3, 4, seed=1), draw(12, 3, 4, seed=2)
    total = 0.0
    for ir in (False, True):
        errors = [
            math.dist(compensated[i].flatten().tolist(), centre(features, int(LABELS[i]), not ir))
            for i in range(12)
            if IS_IR[i].item() == ir
        ]
        total += sum(errors) / len(errors)
    result = modality_consistency(compensated, features, LABELS, IS_IR)
    assert result.item() == pytest.approx(total)


@pytest.mark.parametrize("flows", [False, True])
def test_the_centroids_are_targets_unless_told_otherwise(flows: bool) -> None:
    compensated = draw(12, 3, 4, seed=1).requires_grad_()
    features = draw(12, 3, 4, seed=2).requires_grad_()
    torch.autograd.backward(
        modality_consistency(compensated, features, LABELS, IS_IR, centroid_gradient=flows)
    )
    assert compensated.grad is not None
    assert compensated.grad.abs().sum() > 0
    assert (features.grad is not None) == flows


def plain_distances(x: torch.Tensor, modulation: Modulation) -> list[list[float]]:
    """Equation (13), then the distance, for every query and every other sample."""
    changed = modulate(x, modulation)
    return [
        [math.dist(x[q].flatten().tolist(), changed[q, n].flatten().tolist()) for n in range(12)]
        for q in range(12)
    ]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("form", ["batch_hard", "mean_triplet", "softmax"])
def test_modulation_loss_is_equation_14_in_every_form(form: ModulationForm, across: bool) -> None:
    x = draw(12, 2, 5, seed=3)
    modulation = Modulation(1 + 0.3 * draw(12, 5, seed=4), 0.2 * draw(12, 5, seed=5))
    distances, margin, temperature = plain_distances(x, modulation), 0.3, 2.0
    terms = []
    for q in range(12):
        others = [n for n in range(12) if n != q and (not across or IS_IR[n] != IS_IR[q])]
        positives = [distances[q][n] for n in others if LABELS[n] == LABELS[q]]
        negatives = [distances[q][n] for n in others if LABELS[n] != LABELS[q]]
        if form == "batch_hard":
            terms.append(max(0.0, margin + max(positives) - min(negatives)))
        elif form == "mean_triplet":
            terms += [max(0.0, margin + p - n) for p in positives for n in negatives]
        else:
            against = sum(math.exp(-(n**2) / temperature) for n in negatives)
            for p in positives:
                own = math.exp(-(p**2) / temperature)
                terms.append(-math.log(own / (own + against)))
    result = modulation_discriminative(
        x,
        modulation,
        LABELS,
        IS_IR,
        form=form,
        margin=margin,
        temperature=temperature,
        across_modalities=across,
    )
    assert result.item() == pytest.approx(sum(terms) / len(terms))


@pytest.mark.parametrize("form", ["batch_hard", "mean_triplet", "softmax"])
def test_modulation_loss_has_finite_gradients_where_distances_are_zero(
    form: ModulationForm,
) -> None:
    x = torch.zeros(12, 2, 5, requires_grad=True)
    gamma = torch.ones(12, 5, requires_grad=True)
    modulation = Modulation(gamma, torch.zeros(12, 5))
    torch.autograd.backward(modulation_discriminative(x, modulation, LABELS, IS_IR, form=form))
    for gradient in (x.grad, gamma.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
