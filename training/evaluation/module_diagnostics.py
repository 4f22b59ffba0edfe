"""Are the two modules alive? Modulation and compensation can do nothing and pass for correct.

γ starts at 1 and β at 0, and F̂ can be one constant per modality: both leave the ranking as it is.
The figures here tell a module that works from one that idles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import Modality, Modulation
from training.datasets import Sample
from training.evaluation.metrics import BoolArray, FloatArray, IntArray

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ModulationDiagnostics:
    """What the query's γ, β do to the ranking.

    gamma_mean: mean of γ over queries and channels; 1 is where training starts.
    gamma_std: deviation of γ over the queries, per channel, then averaged over channels; 0
        means that γ does not depend on the query.
    beta_to_feature: mean ‖β‖ over queries / mean ‖y‖ over gallery images, both over all P·D
        numbers (β is added to every part).
    top10_changed: share of queries whose ten nearest are other images than without modulation.
    top10_reordered: share of queries whose ten nearest are others or in another order.
    map_gain: modulated − unmodulated mAP, mean over trials.
    map_gain_low: lower end of its 95 % bootstrap interval, query identities resampled.
    map_gain_high: upper end.
    """

    gamma_mean: float
    gamma_std: float
    beta_to_feature: float
    top10_changed: float
    top10_reordered: float
    map_gain: float
    map_gain_low: float
    map_gain_high: float


@dataclass(frozen=True)
class CompensationDiagnostics:
    """What F̂ of one missing modality is worth (the paper's Figure 4 as a number).

    images: images that were compensated, all of the other modality.
    rank_1: share of F̂ whose nearest centroid of real F of the missing modality is its own
        identity's, Euclidean over P·D.
    chance: rank_1 of a guess, 1 / number of centroids.
    variance_to_mean: mean ‖F̂ − mean F̂‖² / ‖mean F̂‖² over those images; 0 means that F̂ is the
        same for every image.
    """

    images: int
    rank_1: float
    chance: float
    variance_to_mean: float


def gamma_beta_figures(modulation: Modulation, gallery: Tensor) -> tuple[float, float, float]:
    """gamma_mean, gamma_std and beta_to_feature: modulation of Q queries, gallery N×P×D."""
    gamma, beta = modulation
    parts = gallery.shape[1]
    return (
        float(gamma.mean()),
        float(gamma.std(dim=0, correction=0).mean()),
        float(beta.norm(dim=1).mean() * parts**0.5 / gallery.flatten(1).norm(dim=1).mean()),
    )


def top_changes(
    modulated: FloatArray, unmodulated: FloatArray, excluded: BoolArray, top: int = 10
) -> tuple[float, float]:
    """Shares of queries whose nearest `top` are other images, and others or in another order.

    All three are Q×N; images that the protocol excludes for a query come last.
    """
    with_modulation, without = (
        nearest_kept(distance, excluded, top) for distance in (modulated, unmodulated)
    )
    changed = (np.sort(with_modulation, axis=1) != np.sort(without, axis=1)).any(axis=1)
    reordered = (with_modulation != without).any(axis=1)
    return float(changed.mean()), float(reordered.mean())


def nearest_kept(distance: FloatArray, excluded: BoolArray, top: int) -> IntArray:
    """Columns of the nearest `top` (fewer in a smaller gallery), ascending: Q×top.

    Images that the protocol excludes come last. Not by a whole sort: a multi-shot gallery has
    thousands of images.
    """
    kept = np.where(excluded, np.inf, distance)
    top = min(top, kept.shape[1])
    columns = np.sort(np.argpartition(kept, top - 1, axis=1)[:, :top], axis=1)
    order = np.argsort(np.take_along_axis(kept, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def bootstrap_interval(
    differences: FloatArray, identities: IntArray, *, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean difference, resampling whole identities.

    The queries of one person are alike and no independent draws: resampling single queries would
    give an interval that is too narrow.

    differences: one per query.
    identities: the person of each query.
    seed: of the 2,000 resamples.
    """
    _, group = np.unique(identities, return_inverse=True)
    sums = np.bincount(group, weights=differences)
    counts = np.bincount(group)
    drawn = np.random.default_rng(seed).integers(counts.size, size=(RESAMPLES, counts.size))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def diagnose_compensation(
    samples: Sequence[Sample], features: Tensor, compensated: Tensor, missing: Modality
) -> CompensationDiagnostics | None:
    """Judge the F̂ that stand in for `missing`; None where no identity has both modalities.

    samples: N samples.
    features: raw F, N×P×D.
    compensated: F̂, N×P×D; those of images of the other modality are judged.
    missing: the modality that F̂ stands in for.
    """
    people = torch.tensor([sample.person_id for sample in samples])
    is_real = torch.tensor([sample.modality == missing for sample in samples])
    identities = torch.unique(people[is_real])
    judged = ~is_real & torch.isin(people, identities)
    if not judged.any():
        return None
    centroids = torch.stack(
        [features[is_real & (people == identity)].mean(dim=0) for identity in identities]
    )
    substitutes = compensated[judged].flatten(1)  # images×PD
    # Directly, not through a matrix product: the differences between centroids can be small.
    nearest = torch.cdist(
        substitutes, centroids.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(dim=1)
    mean = substitutes.mean(dim=0)
    variance = (substitutes - mean).square().sum(dim=1).mean()
    return CompensationDiagnostics(
        images=int(judged.sum()),
        rank_1=float((identities[nearest] == people[judged]).float().mean()),
        chance=1 / len(identities),
        variance_to_mean=float(variance / mean.square().sum()),
    )
