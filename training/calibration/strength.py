"""How far γ and β are followed, chosen on people that the network was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model import CMT, Modulation, modulation_of
from model.modulation import Strength
from training.calibration.people import HeldOut
from training.evaluation.metrics import excluded_pairs, score_queries
from training.evaluation.module_diagnostics import top_changes
from training.evaluation.protocols import protocol_splits
from training.evaluation.scoring import distances
from training.evaluation.splits import Split

STEPS = tuple(step / 10 for step in range(1, 11))
LEAST_CHANGED = 0.3  # of the queries must have another ten nearest than without modulation


@dataclass(frozen=True)
class Step:
    """One strength s. mean_ap, changed: of each set, fractions; the latter as `top_changes`."""

    s: float
    mean_ap: list[float]
    changed: list[float]


@dataclass(frozen=True)
class StrengthChoice:
    """chosen: None where the network has no instance alignment. steps: s = 0 first."""

    chosen: Strength | None
    steps: list[Step]

    @property
    def enough(self) -> bool:
        """Whether modulation changes the ten nearest of enough queries."""
        return self.chosen is None or any(
            step.s == self.chosen.s and _mean(step.changed) >= LEAST_CHANGED for step in self.steps
        )


def choose_strength(model: CMT, held_out: HeldOut) -> StrengthChoice:
    """The s of the best mAP, mean over the sets, by the main search of the data set's protocol.

    Of those that change enough answers; where none does, the one that changes most. c is the mean
    of γ over channels and images. The network's own strength is left out of account.
    Raises DatasetError where a set has no such search.
    """
    if model.generator_gamma is None:
        return StrengthChoice(None, [])
    model.strength = None
    modulation = modulation_of(model, held_out.embedding)
    center = float(modulation.gamma.double().mean())
    splits = [_splits(held_out, number) for number in np.unique(held_out.sets).tolist()]
    steps = []
    for s in (0.0, *STEPS):
        applied = Strength(s, center).applied(modulation)
        found = [_scores(model, held_out, of_set, applied) for of_set in splits]
        steps.append(Step(s, [mean_ap for mean_ap, _ in found], [share for _, share in found]))
    able = [step for step in steps[1:] if _mean(step.changed) >= LEAST_CHANGED]
    able = able or [max(steps[1:], key=lambda step: _mean(step.changed))]
    best = max(able, key=lambda step: _mean(step.mean_ap))
    return StrengthChoice(Strength(best.s, center), steps)


def _splits(held_out: HeldOut, number: int) -> list[Split]:
    """The main searches among one set's people: of SYSU-MM01 all-search single-shot, else all."""
    rows = np.flatnonzero(held_out.sets == number)
    samples = [held_out.samples[row] for row in rows.tolist()]
    splits = protocol_splits(held_out.dataset, samples)
    if held_out.protocol == "sysu":
        splits = splits[:1]
    return [
        Split(
            *(split.protocol, split.setting, split.shots, split.convention, rows[split.queries]),
            [rows[gallery] for gallery in split.galleries],
        )
        for split in splits
    ]


def _scores(
    model: CMT, held_out: HeldOut, splits: Sequence[Split], modulation: Modulation
) -> tuple[float, float]:
    """mAP and the share of queries with other ten nearest, means over searches and trials."""
    mean_aps, changes = [], []
    for split in splits:
        pool = np.unique(np.concatenate(split.galleries))
        places = torch.from_numpy(split.queries)
        x, y = held_out.rows(split.queries), held_out.rows(pool)
        of_queries = Modulation(modulation.gamma[places], modulation.beta[places])
        modulated = distances(model.distance, x, y, of_queries)
        plain = distances(model.distance, x, y, Modulation.identity(*of_queries.gamma.shape))
        for gallery in split.galleries:
            columns = np.searchsorted(pool, gallery)
            labels = (
                *(held_out.people[split.queries], held_out.people[gallery]),
                *(held_out.cameras[split.queries], held_out.cameras[gallery]),
            )
            ranked = score_queries(modulated[:, columns], *labels, split.protocol)
            mean_aps.append(ranked.summary().mean_ap)
            excluded = excluded_pairs(*labels, split.protocol)
            changes.append(top_changes(modulated[:, columns], plain[:, columns], excluded)[0])
    return _mean(mean_aps), _mean(changes)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
