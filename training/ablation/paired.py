"""Paired comparisons: two ways of training or ranking on the same queries and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.ablation.results import RankingResult
from training.evaluation.module_diagnostics import bootstrap_interval


@dataclass(frozen=True)
class SeedSpread:
    """Mean over seeds and sample deviation (n − 1), as fractions; one seed has no deviation."""

    mean: float
    std: float | None

    @classmethod
    def over(cls, values: Sequence[float]) -> SeedSpread:
        """Of one value per seed."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        deviation = "" if self.std is None else f" ± {100 * self.std:.2f}"
        return f"{100 * self.mean:.2f}{deviation}"


@dataclass(frozen=True)
class PairedComparison:
    """One way minus another; figures are fractions.

    title: what is compared, "one − other".
    map_gain: difference of mAP, mean over seeds.
    low, high: its 95 % interval by `bootstrap_interval`, from every query's difference of AP,
        averaged over the seeds. It is about other people, not about other seeds.
    map_gain_of_seeds, rank_1_gain_of_seeds: the same differences seed by seed.
    """

    title: str
    map_gain: float
    low: float
    high: float
    map_gain_of_seeds: list[float]
    rank_1_gain_of_seeds: list[float]


def compare_paired(
    title: str,
    ones: Sequence[RankingResult],
    others: Sequence[RankingResult],
    query_people: Sequence[int],
) -> PairedComparison:
    """`ones` minus `others`, one entry per seed in the same order.

    query_people: the person of every query, in the order of `RankingResult.average_precision`.
    """
    pairs = list(zip(ones, others, strict=True))
    differences = np.mean(
        [np.subtract(one.average_precision, other.average_precision) for one, other in pairs],
        axis=0,
    )
    low, high = bootstrap_interval(differences, np.asarray(query_people, dtype=np.int64))
    return PairedComparison(
        title=title,
        map_gain=float(differences.mean()),
        low=low,
        high=high,
        map_gain_of_seeds=[
            float(np.subtract(one.average_precision, other.average_precision).mean())
            for one, other in pairs
        ],
        rank_1_gain_of_seeds=[one.mean("rank_1") - other.mean("rank_1") for one, other in pairs],
    )
