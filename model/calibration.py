"""Distance → probability of "same person": what a calibration holds, and how it is applied.

γ and β scale distances query by query, so the distances of two queries are on no common scale. A
query therefore first measures its distances to a fixed reference set, a few embeddings of each
modality that the checkpoint carries, and its distances d become scores s by one of

    raw        s = d
    ratio      s = d / m
    log-ratio  s = ln(d / m)
    z-score    s = (d − μ) / σ

with m, μ, σ the median, mean and deviation of the reference distances. Speaker verification calls
this test normalisation (Auckenthaler, Carey, Lloyd-Thomas, "Score Normalization for
Text-Independent Speaker Verification Systems", Digital Signal Processing 2000). A curve fitted on
held-out people turns s into a probability, non-increasing in d for every query.

The probability is that of a pair drawn with the prior stated in the facts: a pair that is as
likely beforehand to show one person as that prior says. It is not that of the first of a ranking,
which was picked from many pairs because it looked best. Another prior π' is reached by
odds' = odds · π'/(1−π') · (1−π)/π.

There is one curve for every pair of modalities and way of ranking (modulated, unmodulated).
`training.calibration` fits them; this module is the only place that applies them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from model.config import MODALITIES, Metric, Modality
from model.modulation import (
    Modulation,
    Strength,
    lift,
    lifted_distances,
    part_distances,
    project_arrays,
    ranking_distance,
)
from model.ranking.agreement import agreement
from model.ranking.facts import RankingFacts
from model.ranking.scores import Moments, moments_of
from model.training_facts import LearntPeople

Normalisation = Literal["raw", "ratio", "log-ratio", "z-score"]
NORMALISATIONS: tuple[Normalisation, ...] = ("raw", "ratio", "log-ratio", "z-score")
FloatArray = npt.NDArray[np.float64]

_SMALLEST = 1e-12  # lower bound of divisors and of the arguments of logarithms


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LogisticCurve(_Record):
    """p(s) = 1 / (1 + exp(−(slope·s + intercept))); slope ≤ 0."""

    method: Literal["logistic"] = "logistic"
    slope: float = Field(le=0)
    intercept: float

    def __call__(self, scores: FloatArray) -> FloatArray:
        """Scores s of any shape → probabilities."""
        half = (self.slope * scores + self.intercept) / 2
        probabilities: FloatArray = (1 + np.tanh(half)) / 2  # the same without overflow
        return probabilities


class IsotonicCurve(_Record):
    """Straight lines between knots, constant beyond the first and last."""

    method: Literal["isotonic"] = "isotonic"
    scores: tuple[float, ...] = Field(min_length=1, description="Of the knots, ascending.")
    probabilities: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        description="Of the knots, never ascending."
    )

    @model_validator(mode="after")
    def _knots_descend(self) -> IsotonicCurve:
        if len(self.scores) != len(self.probabilities):
            raise ValueError("a curve needs as many probabilities as scores")
        if (np.diff(self.scores) <= 0).any() or (np.diff(self.probabilities) > 0).any():
            raise ValueError("scores must ascend and probabilities must not")
        return self

    def __call__(self, scores: FloatArray) -> FloatArray:
        """Scores s of any shape → probabilities."""
        probabilities: FloatArray = np.interp(scores, self.scores, self.probabilities)
        return probabilities


class Candidate(_Record):
    """A normalisation and curve that were compared; log_loss [nats a pair] is cross-fitted."""

    normalisation: Normalisation
    method: Literal["logistic", "isotonic"]
    log_loss: float


class Threshold(_Record):
    """The similarity above which a pair is accepted, for one share of false accepts among pairs.

    similarity: accept what is above it; None where the pairs of different people are too few to
    tell. measured_false_accept_rate, true_accept_rate: cross-fitted, a threshold from some people
    applied to the pairs of others.
    """

    false_accept_rate: float
    similarity: float | None = None
    measured_false_accept_rate: float | None = None
    true_accept_rate: float | None = None


class CalibrationMap(_Record):
    """Distance → probability for one modality pair and way of ranking, with how it was chosen.

    log_loss [nats a pair] and expected_calibration_error are cross-fitted over people, pairs
    weighted to the prior; a constant answer would have the log loss `log_loss_of_prior`.
    positives, negatives: pairs of one person and of two people. identities: people with positives.
    """

    query: Modality
    gallery: Modality
    modulated: bool
    normalisation: Normalisation
    curve: Annotated[LogisticCurve | IsotonicCurve, Field(discriminator="method")]
    positives: int
    negatives: int
    identities: int
    log_loss: float
    log_loss_of_prior: float
    expected_calibration_error: float
    thresholds: tuple[Threshold, ...]
    candidates: tuple[Candidate, ...]


class CalibrationFacts(_Record):
    """The part of a calibration that is JSON.

    prior: the share of same-person pairs that the probabilities assume. people: whom it was fitted
    on, set by set; by their numbers alone where an early release fitted it. strength: of the
    modulation, chosen on them; None in those of earlier releases, which ranked by γ and β as
    trained. ranking: what else ranking goes by; None in those of earlier releases.
    """

    prior: float = Field(gt=0, lt=1)
    people: tuple[LearntPeople, ...]
    maps: tuple[CalibrationMap, ...]
    strength: Strength | None = None
    ranking: RankingFacts | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_set(cls, values: Any) -> Any:
        """Earlier releases knew one set of people, and kept what it is among the facts."""
        if not isinstance(values, dict) or "dataset" not in values:
            return values
        values = dict(values)
        one = {name: values.pop(name, None) for name in ("dataset", "identities", "name")}
        images = values.pop("images", "")
        if not images:
            one["name"] = one["dataset"]
        return values | {"people": [one | {"images": images}]}


@dataclass(frozen=True, eq=False)
class Calibration:
    """How a checkpoint's distances become probabilities.

    facts: curves and how they were fitted. references: per modality R×P×D embeddings, fp16.
    metric: the checkpoint's, used for all distances.
    """

    facts: CalibrationFacts
    references: Mapping[Modality, Tensor]
    metric: Metric

    def __post_init__(self) -> None:
        """Raise ValueError where what is compared with references has none, or of other parts."""
        agreements = self.facts.ranking.agreements if self.facts.ranking else ()
        for gallery in (fit.gallery for fits in (self.facts.maps, agreements) for fit in fits):
            if not len(self.references.get(gallery, ())):
                raise ValueError(f"the calibration has no reference embeddings of {gallery}")
        for one in agreements:
            parts = self.references[one.gallery].shape[1]
            if not len(one.slopes) == len(one.intercepts) == parts:
                raise ValueError(f"the calibration's agreement is not that of {parts} parts")

    def map_of(self, query: str, gallery: str, *, modulated: bool) -> CalibrationMap | None:
        """The curve for a query and gallery modality, None where there is none."""
        wanted = (query, gallery, modulated)
        maps = self.facts.maps
        return next((m for m in maps if (m.query, m.gallery, m.modulated) == wanted), None)

    @torch.inference_mode()
    def measured(self, x: Tensor, modulation: Modulation) -> dict[Modality, FloatArray]:
        """Queries x (Q×P×D) under γ, β (Q×D) to the references of each modality → Q×R."""
        if self.metric == "cosine":
            return {
                modality: reference_distances(x, modulation, rows, self.metric)
                for modality, rows in self.references.items()
            }
        if not self.references:
            return {}
        every = np.empty((len(x), len(self._lifted)))
        given = (one.numpy().astype(np.float64) for one in (x, *modulation))
        for row, w, c in zip(every, *project_arrays(*given), strict=True):
            row[:] = lifted_distances(torch.from_numpy(w), float(c), self._lifted)
        found, end = {}, 0
        for modality, rows in self.references.items():
            start, end = end, end + len(rows)
            found[modality] = every[:, start:end]
        return found

    @cached_property
    def _lifted(self) -> Tensor:
        """The references of all modalities, lifted once and not for every query."""
        return lift(torch.cat([rows.double() for rows in self.references.values()]))

    def similarities(
        self,
        measured: Mapping[Modality, FloatArray],
        distances: Sequence[float],
        *,
        query: str,
        gallery: Sequence[Modality],
        modulated: bool,
    ) -> list[float | None]:
        """One query's distances → probabilities of "same person", None where there is no curve.

        measured: the query's distances to the references, as `measured` gives them, 1×R each.
        distances: N, in the checkpoint's metric.
        query: modality of the query; anything but "rgb" and "ir" ("mixed") has no curve.
        gallery: modality of each of the N items.
        modulated: whether all distances are under the query's γ, β.
        """
        found: list[float | None] = [None] * len(distances)
        for modality in MODALITIES:
            places = [i for i, m in enumerate(gallery) if m == modality]
            chosen = self.map_of(query, modality, modulated=modulated)
            if not places or chosen is None:
                continue
            distance = np.array([[distances[i] for i in places]], dtype=np.float64)
            values = chosen.curve(normalised(distance, measured[modality], chosen.normalisation))
            for place, value in zip(places, values[0].tolist(), strict=True):
                found[place] = value
        return found

    def agreements(
        self,
        x: Tensor,
        parts: Sequence[Sequence[float]],
        *,
        query: str,
        gallery: Sequence[Modality],
    ) -> list[list[float] | None]:
        """What the parts of one query (P×D) say of N items, see `model.ranking.agreement`.

        parts: squared unmodulated part distances to the items, N×P. query, gallery: as of
        `similarities`. None where there is no fit.
        """
        identity = Modulation.identity(1, x.shape[1])
        found: list[list[float] | None] = [None] * len(parts)
        for modality in MODALITIES:
            places = [i for i, m in enumerate(gallery) if m == modality]
            fit = self.facts.ranking and self.facts.ranking.agreement(query, modality)
            if not places or not fit:
                continue
            reference = part_distances(x[None].double(), self.references[modality], identity)[0]
            chosen = np.array([parts[i] for i in places], np.float64)
            for place, row in zip(
                places, agreement(chosen, reference.numpy(), fit).tolist(), strict=True
            ):
                found[place] = row
        return found

    def summary(self) -> dict[str, Any]:
        """All facts as JSON, without the knots of isotonic curves and who the people are."""
        facts = self.facts.model_dump(
            mode="json",
            exclude={"maps": {"__all__": {"curve": {"scores", "probabilities"}}}, "people": True},
        )
        facts["sets"] = [
            {"dataset": one.dataset, "name": one.name, "identities": len(one.identities)}
            for one in self.facts.people
        ]
        facts["identities"] = sum(len(one.identities) for one in self.facts.people)
        facts["references"] = {name: len(rows) for name, rows in self.references.items()}
        return facts


def moments_over(measured: Mapping[Modality, FloatArray]) -> list[dict[Modality, Moments]]:
    """Of each of Q queries' distances to references, Q×R for each of their modalities."""
    columns = [[moments_of(row) for row in distances] for distances in measured.values()]
    return [dict(zip(measured, row, strict=True)) for row in zip(*columns, strict=True)]


@torch.inference_mode()
def reference_distances(
    x: Tensor, modulation: Modulation, references: Tensor, metric: Metric
) -> FloatArray:
    """Queries x (Q×P×D) with their modulation to the reference set R×P×D → Q×R, in float64."""
    gamma, beta = modulation
    distance: FloatArray = ranking_distance(
        x.double(), references.double(), Modulation(gamma.double(), beta.double()), metric
    ).numpy()
    return distance


def normalised(distance: FloatArray, reference: FloatArray, how: Normalisation) -> FloatArray:
    """Distances Q×N → scores Q×N, by each query's distances to the reference set, Q×R."""
    if how == "raw":
        return distance
    scores: FloatArray
    if how == "z-score":
        mean, deviation = (f(reference, axis=1, keepdims=True) for f in (np.mean, np.std))
        scores = (distance - mean) / np.maximum(deviation, _SMALLEST)
        return scores
    ratio = np.maximum(distance, 0) / np.maximum(
        np.median(reference, axis=1, keepdims=True), _SMALLEST
    )
    scores = ratio if how == "ratio" else np.log(np.maximum(ratio, _SMALLEST))
    return scores
