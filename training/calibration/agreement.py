"""Fit what the distances of single parts say, see `model.ranking.agreement`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from sklearn.metrics import roc_auc_score

from model import Modality, Modulation
from model.calibration import FloatArray
from model.config import MODALITIES
from model.modulation import part_distances
from model.ranking import AgreementFit
from model.ranking.agreement import standard_parts
from training.calibration.curves import fit_logistic
from training.calibration.searches import Fold
from training.evaluation.metrics import BoolArray, excluded_pairs

_QUERIES = 150  # of a fold and modality


@dataclass(frozen=True)
class PartFigures:
    """Pairs by one part alone: the area under the ROC curve of same against different people, mean
    agreement of either. One number a part."""

    area: list[float]
    same: list[float]
    different: list[float]


def fit_agreements(folds: Sequence[Fold]) -> list[tuple[AgreementFit, PartFigures]]:
    """One for each pair of modalities that has pairs of one person."""
    found = []
    for query, gallery in product(MODALITIES, MODALITIES):
        parts = [_parts(fold, query, gallery) for fold in folds]
        standard = np.concatenate([rows for rows, _ in parts])
        same = np.concatenate([labels for _, labels in parts])
        if same.all() or not same.any():
            continue
        curves = [fit_logistic(-part, same, 0.5) for part in standard.T]
        fit = AgreementFit(
            query=query,
            gallery=gallery,
            slopes=tuple(-curve.slope for curve in curves),
            intercepts=tuple(curve.intercept for curve in curves),
        )
        agreements = [curve(-part) for curve, part in zip(curves, standard.T, strict=True)]
        figures = PartFigures(
            area=[float(roc_auc_score(same, part)) for part in standard.T],
            same=[float(values[same].mean()) for values in agreements],
            different=[float(values[~same].mean()) for values in agreements],
        )
        found.append((fit, figures))
    return found


def _parts(fold: Fold, query: Modality, gallery: Modality) -> tuple[FloatArray, BoolArray]:
    """Pairs that count × parts in deviations, and whether each pair is of one person."""
    generator = np.random.default_rng(0)
    rows, columns = (np.flatnonzero(fold.modalities == m) for m in (query, gallery))
    rows = np.sort(generator.choice(rows, min(rows.size, _QUERIES), replace=False))
    x, y = fold.images[rows], fold.images[columns]
    identity = Modulation.identity(len(x), x.shape[2])
    parts = part_distances(x, y, identity).double().numpy()
    references = part_distances(x, fold.references[gallery], identity).double().numpy()
    standard = np.stack([standard_parts(*one) for one in zip(parts, references, strict=True)])
    people, cameras = fold.people, fold.cameras
    labels = people[rows], people[columns], cameras[rows], cameras[columns]
    same = people[rows][:, None] == people[columns]
    counted = ~excluded_pairs(*labels, fold.protocol)
    counted &= ~(same & (cameras[rows][:, None] == cameras[columns]))
    return standard[counted], same[counted]
