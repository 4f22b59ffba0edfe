"""One checkpoint on one set: modulated and unmodulated ranking side by side, and both modules.

`evaluate_sysu` computes an `Evaluation`; `table` shows it in a terminal, `to_json` in a file.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from model import CMT, Modulation
from model.config import MODALITIES
from training.datasets import Sample
from training.evaluation.embedding import Embedded, embed_samples
from training.evaluation.metrics import (
    FloatArray,
    IntArray,
    RankMetrics,
    excluded_pairs,
    score_queries,
)
from training.evaluation.sysu import choose_trials, query_indices
from training.evaluation.vitality import (
    CompensationVitality,
    ModulationVitality,
    bootstrap_interval,
    compensation_vitality,
    gamma_beta_figures,
    top_changes,
)

QUERY_BLOCK = 512


@dataclass(frozen=True)
class Spread:
    """Mean and population standard deviation of a figure over the trials, as a fraction."""

    mean: float
    std: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "Spread":
        return cls(float(np.mean(values)), float(np.std(values)))

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.std:.2f}"


@dataclass(frozen=True)
class Ranking:
    """The protocol's figures for one way of ranking."""

    rank_1: Spread
    rank_5: Spread
    rank_10: Spread
    rank_20: Spread
    mean_ap: Spread
    mean_inp: Spread


@dataclass(frozen=True)
class Evaluation:
    """Everything an evaluation says; figures are fractions in [0, 1].

    Attributes:
        protocol: in words.
        trials: "official" or "seeded", which convention drew the galleries.
        identities, queries, gallery: sizes (gallery: images per trial, mean).
        metric: the distance that ranks, "euclidean" or "cosine".
        modulated, unmodulated: rankings with the query's γ, β and with γ = 1, β = 0.
        modulation: None where the network has no instance alignment.
        compensation: per missing modality; None where the network has no modality alignment.
    """

    protocol: str
    trials: str
    identities: int
    queries: int
    gallery: float
    metric: str
    modulated: Ranking
    unmodulated: Ranking
    modulation: ModulationVitality | None
    compensation: dict[str, CompensationVitality | None] | None

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def evaluate_sysu(
    model: CMT,
    samples: Sequence[Sample],
    *,
    trial_file: Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
) -> Evaluation:
    """All-search single-shot on SYSU-MM01, 10 trials; the network runs on the device it is on.

    Args:
        samples: all images of the test identities, as `read_sysu` lists them.
        trial_file: the official `rand_perm_cam.mat`; None, or a file that is not there, draws
            seeded trials.
        batch_size, workers: as in `embed_samples`.

    Raises:
        DatasetError: there are no queries or no gallery, or the trial file is of another set.
        ValueError: no query has a positive, or the network's output is not finite.
    """
    queries = query_indices(samples)
    trials = choose_trials(samples, trial_file)
    embedded = embed_samples(model, samples, batch_size=batch_size, workers=workers)
    pool = np.unique(np.concatenate(trials.galleries))  # every image that any trial uses
    query_features = embedded.embedding[torch.from_numpy(queries)]
    pool_features = embedded.embedding[torch.from_numpy(pool)]
    modulation = _modulation(model, query_features)
    identity = Modulation.identity(*modulation.gamma.shape)
    modulated = _distances(model, query_features, pool_features, modulation)
    unmodulated = _distances(model, query_features, pool_features, identity)

    people = np.array([sample.person_id for sample in samples])
    cameras = np.array([sample.camera for sample in samples])
    with_scores, without_scores, changes = [], [], []
    for gallery in trials.galleries:
        labels = people[queries], people[gallery], cameras[queries], cameras[gallery]
        columns = np.searchsorted(pool, gallery)
        with_scores.append(score_queries(modulated[:, columns], *labels, "sysu"))
        without_scores.append(score_queries(unmodulated[:, columns], *labels, "sysu"))
        changes.append(
            top_changes(
                modulated[:, columns], unmodulated[:, columns], excluded_pairs(*labels, "sysu")
            )
        )
    gains = [
        scores.average_precision - plain.average_precision
        for scores, plain in zip(with_scores, without_scores, strict=True)
    ]
    # Whether a query has a positive depends on identity and camera only, hence on no trial.
    answerable = with_scores[0].answerable
    return Evaluation(
        protocol="SYSU-MM01 all-search single-shot",
        trials=trials.convention,
        identities=len(np.unique(people)),
        queries=int(answerable.sum()),
        gallery=float(np.mean([gallery.size for gallery in trials.galleries])),
        metric=model.config.metric,
        modulated=_ranking([scores.summary() for scores in with_scores]),
        unmodulated=_ranking([scores.summary() for scores in without_scores]),
        modulation=(
            _modulation_vitality(
                modulation,
                pool_features,
                np.mean(changes, axis=0),
                np.mean(gains, axis=0)[answerable],
                people[queries][answerable],
            )
            if model.config.instance_alignment
            else None
        ),
        compensation=_compensation(embedded),
    )


def table(evaluation: Evaluation) -> Table:
    """The evaluation as the terminal shows it, in percent."""
    sizes = f"{evaluation.queries} queries, {evaluation.gallery:.0f} gallery images"
    shown = Table(
        title=f"{evaluation.protocol}, {evaluation.trials} trials",
        caption=f"{evaluation.identities} identities, {sizes}, {evaluation.metric}; "
        "percent, mean ± std over trials",
    )
    shown.add_column("")
    shown.add_column("modulated", justify="right")
    shown.add_column("unmodulated", justify="right")
    modulated, unmodulated = evaluation.modulated, evaluation.unmodulated
    for name, field in (
        ("rank-1", "rank_1"),
        ("rank-5", "rank_5"),
        ("rank-10", "rank_10"),
        ("rank-20", "rank_20"),
        ("mAP", "mean_ap"),
        ("mINP", "mean_inp"),
    ):
        shown.add_row(name, str(getattr(modulated, field)), str(getattr(unmodulated, field)))
    return shown


def vitality_lines(evaluation: Evaluation) -> list[str]:
    """What shows that the two modules are alive, one sentence each."""
    lines = []
    if (m := evaluation.modulation) is not None:
        lines += [
            f"γ over queries: mean {m.gamma_mean:.3f}, deviation {m.gamma_std:.4f}; "
            f"‖β‖/‖y‖ {m.beta_to_feature:.3f}",
            f"top 10 changed by modulation for {m.top10_changed:.1%} of queries "
            f"(changed or reordered {m.top10_reordered:.1%})",
            f"mAP modulated − unmodulated {100 * m.map_gain:+.2f} points, 95 % interval "
            f"[{100 * m.map_gain_low:+.2f}, {100 * m.map_gain_high:+.2f}] "
            "(bootstrap over query identities)",
        ]
    for missing, c in (evaluation.compensation or {}).items():
        if c is not None:
            lines.append(
                f"compensated {missing} features: rank-1 {c.rank_1:.1%} against real {missing} "
                f"centroids (chance {c.chance:.1%}, {c.images} images); variance / ‖mean‖² "
                f"{c.variance_to_mean:.3f}"
            )
    return lines


def _modulation(model: CMT, queries: Tensor) -> Modulation:
    """γ, β of all queries, on the CPU."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        return Modulation(*(part.float().cpu() for part in model.modulation(queries.to(device))))


def _distances(model: CMT, queries: Tensor, gallery: Tensor, modulation: Modulation) -> FloatArray:
    """Q×N in blocks of queries, in float64: c − ⟨w, z⟩ cancels where the distance is small."""
    blocks = (
        model.distance(x.double(), gallery.double(), Modulation(gamma.double(), beta.double()))
        for x, gamma, beta in zip(
            torch.split(queries, QUERY_BLOCK),
            torch.split(modulation.gamma, QUERY_BLOCK),
            torch.split(modulation.beta, QUERY_BLOCK),
            strict=True,
        )
    )
    return torch.cat(list(blocks)).numpy()


def _ranking(trials: Sequence[RankMetrics]) -> Ranking:
    def rank(k: int) -> Spread:
        return Spread.over([float(trial.cmc[k - 1]) for trial in trials])

    return Ranking(
        rank_1=rank(1),
        rank_5=rank(5),
        rank_10=rank(10),
        rank_20=rank(20),
        mean_ap=Spread.over([trial.mean_ap for trial in trials]),
        mean_inp=Spread.over([trial.mean_inp for trial in trials]),
    )


def _modulation_vitality(
    modulation: Modulation,
    gallery: Tensor,
    changes: FloatArray,
    gains: FloatArray,
    identities: IntArray,
) -> ModulationVitality:
    gamma_mean, gamma_std, beta_to_feature = gamma_beta_figures(modulation, gallery)
    low, high = bootstrap_interval(gains, identities)
    return ModulationVitality(
        gamma_mean=gamma_mean,
        gamma_std=gamma_std,
        beta_to_feature=beta_to_feature,
        top10_changed=float(changes[0]),
        top10_reordered=float(changes[1]),
        map_gain=float(gains.mean()),
        map_gain_low=low,
        map_gain_high=high,
    )


def _compensation(embedded: Embedded) -> dict[str, CompensationVitality | None] | None:
    if embedded.compensated is None:
        return None
    return {
        missing: compensation_vitality(
            embedded.samples, embedded.features, embedded.compensated, missing
        )
        for missing in MODALITIES
    }
