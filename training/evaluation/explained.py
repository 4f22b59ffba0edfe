"""Do explained answers tell right from wrong? By their `parts`, and by their `agreement`.

`parts` are squared distances under a query's γ and β, and what a distance is worth differs from
query to query; `agreement` compares those without γ and β with distances to other people. In every
trial, first answers that show the person asked for and first answers that do not are drawn, twenty
of each, and told apart by the sum of the parts or by the mean agreement alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from model import Calibration, Modality, Modulation, part_distances
from training.evaluation.metrics import BoolArray, FloatArray

ANSWERS = 20  # right ones of a trial, and wrong ones; fewer of both where there are not as many


class PartAreas(NamedTuple):
    """Of a trial, areas under the ROC curve of right against wrong first answers; 0.5 is chance.

    answers: how many right ones, and as many wrong ones. parts: by the sum of the squared modulated
    distances. agreement: by the mean over the parts.
    """

    answers: int
    parts: float
    agreement: float


def part_areas(
    calibration: Calibration,
    x: Tensor,
    y: Tensor,
    distance: FloatArray,
    right: BoolArray,
    *,
    query: str,
    gallery: Sequence[Modality],
    seed: int,
) -> PartAreas | None:
    """Queries (Q×P×D) and their first answers (Q×P×D) → both areas.

    distance: modulated, of each pair. right: whether the answer shows the person asked for. query,
    gallery: modality of all queries, and of each answer. seed: of the draw, among answers for which
    agreement was fitted. None where all of these are right, or all are wrong.
    """
    from sklearn.metrics import roc_auc_score  # takes a second

    facts = calibration.facts.ranking
    fitted = np.array([bool(facts and facts.agreement(query, kind)) for kind in gallery])
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(of & fitted)) for of in (right, ~right)]
    count = min(ANSWERS, *(places.size for places in drawn))
    if not count:
        return None
    chosen = np.concatenate([places[:count] for places in drawn])
    identity = Modulation.identity(1, x.shape[2])
    agreement = []
    for i in chosen.tolist():
        plain = part_distances(x[[i]].double(), y[[i]], identity)[0].tolist()
        agreement += calibration.agreements(x[i], plain, query=query, gallery=[gallery[i]])
    return PartAreas(
        count,
        parts=float(roc_auc_score(right[chosen], -distance[chosen])),
        agreement=float(roc_auc_score(right[chosen], np.array(agreement).mean(axis=1))),
    )
