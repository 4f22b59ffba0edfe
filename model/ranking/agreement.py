"""Parts that say something: how well each part agrees, against the spread among different people.

The squared distance of a part is compared with the query's squared distances of that part to the
reference embeddings, which are of other people: in deviations below their mean, and then turned
into the probability that two images with this part alone are of one person, drawn at even odds. A
jacket that matches and a head that does not are thus told apart, though one distance is always
larger than the other. All distances are without γ and β, whatever ranks: part by part, those tell
people apart better.
"""

from __future__ import annotations

import numpy as np

from model.ranking.facts import AgreementFit
from model.ranking.scores import FloatArray

_SMALLEST = 1e-12


def standard_parts(parts: FloatArray, references: FloatArray) -> FloatArray:
    """N×P squared part distances of a query, R×P to the references → N×P, larger is better."""
    deviation = np.maximum(references.std(axis=0), _SMALLEST)
    found: FloatArray = (references.mean(axis=0) - parts) / deviation
    return found


def agreement(parts: FloatArray, references: FloatArray, fit: AgreementFit) -> FloatArray:
    """N×P squared part distances of one query → N×P agreements in [0, 1]."""
    standard = standard_parts(parts, references)
    half = (np.array(fit.slopes) * standard + np.array(fit.intercepts)) / 2
    agreements: FloatArray = (1 + np.tanh(half)) / 2
    return agreements
