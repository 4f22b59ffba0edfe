"""One network on the searches of a protocol: every query scored under each way of ranking."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import CMT, Calibration, Modulation
from training.datasets import Sample
from training.evaluation.embedding import Embedded
from training.evaluation.metrics import (
    FloatArray,
    IntArray,
    QueryScores,
    excluded_pairs,
    score_queries,
)
from training.evaluation.module_diagnostics import gamma_beta_figures, nearest_kept, top_changes
from training.evaluation.open_set import OpenSetTrial, open_set_trial
from training.evaluation.rerank import k_reciprocal
from training.evaluation.splits import Split

Distance = Callable[[Tensor, Tensor, Modulation], Tensor]

QUERY_BLOCK = 2048
NEAREST_KEPT = 10  # nearest images that are kept for contact sheets


@dataclass(frozen=True)
class SplitScores:
    """One network on one search; the lists have one entry a trial.

    split: the search.
    identities: people among queries and gallery.
    query_people: the person of each query, Q.
    modulated, unmodulated: scores with the query's γ, β and with γ = 1, β = 0.
    raw: raw part features F in the place of the complete ones, without γ, β: what the
        compensation adds to. None without modality alignment, where they are the same.
    reranked: after k-reciprocal re-ranking of the modulated distances; None where not asked.
    gamma_beta: mean γ, its deviation over queries, ‖β‖/‖y‖ (see `ModulationDiagnostics`).
    top_changes: shares of queries whose nearest ten modulation changes, or changes or reorders.
    nearest: Q×10 indices of the samples that rank first in the first trial, modulated; of no
        meaning for queries that it does not ask.
    open_set: trials of open-set identification by the name of the score: "modulated distance",
        "unmodulated distance" and, where the checkpoint has a calibration for this search,
        "modulated calibrated" and "unmodulated calibrated".
    """

    split: Split
    identities: int
    query_people: IntArray
    modulated: list[QueryScores]
    unmodulated: list[QueryScores]
    raw: list[QueryScores] | None
    reranked: list[QueryScores] | None
    gamma_beta: tuple[float, float, float]
    top_changes: list[tuple[float, float]]
    nearest: IntArray
    open_set: dict[str, list[OpenSetTrial]]


def score_splits(
    model: CMT,
    embedded: Embedded,
    splits: Sequence[Split],
    *,
    rerank: bool = False,
    calibration: Calibration | None = None,
) -> list[SplitScores]:
    """Score every search, computing distances once for searches with the same queries.

    calibration: the checkpoint's; open-set identification is then also by its scores.
    Raises ValueError where the network's output is not finite.
    """
    by_queries = defaultdict(list)
    for split in splits:
        by_queries[split.queries.tobytes()].append(split)
    scored = {}
    for group in by_queries.values():
        space = _Space(model, embedded, group, calibration, rerank=rerank)
        for split in group:
            scored[id(split)] = _score_split(space, embedded.samples, split)
    return [scored[id(split)] for split in splits]


class _Space:
    """Distances from a set of queries to every image that any gallery of theirs uses."""

    def __init__(
        self,
        model: CMT,
        embedded: Embedded,
        splits: Sequence[Split],
        calibration: Calibration | None,
        *,
        rerank: bool,
    ) -> None:
        self.queries = splits[0].queries
        self.pool = np.unique(np.concatenate([g for split in splits for g in split.galleries]))
        x = embedded.embedding[torch.from_numpy(self.queries)]
        self.features = embedded.embedding[torch.from_numpy(self.pool)]
        self.modulation = modulation_of(model, x)
        identity = Modulation.identity(*self.modulation.gamma.shape)
        self.modulated = distances(model.distance, x, self.features, self.modulation)
        self.unmodulated = distances(model.distance, x, self.features, identity)
        self.raw: FloatArray | None = None
        if embedded.compensated is not None:
            raw = model.ranked_form(embedded.features)
            of_queries, of_pool = (
                raw[torch.from_numpy(rows)] for rows in (self.queries, self.pool)
            )
            self.raw = distances(model.distance, of_queries, of_pool, identity)
        self.open_set_scores = {
            "modulated distance": self.modulated,
            "unmodulated distance": self.unmodulated,
        }
        for name, modulation, distance in (
            ("modulated", self.modulation, self.modulated),
            ("unmodulated", identity, self.unmodulated),
        ):
            # Queries of a search are of one modality, and so is its gallery.
            chosen = calibration and calibration.map_of(
                embedded.samples[self.queries[0]].modality,
                embedded.samples[self.pool[0]].modality,
                modulated=name == "modulated",
            )
            if calibration and chosen:
                # The score and not the probability: the same order, without the steps of a curve.
                self.open_set_scores[f"{name} calibrated"] = calibration.scores(
                    chosen, x, modulation, distance
                )
        self.between: npt.NDArray[np.float32] | None = None
        if rerank:  # every image in its turn as the query, with its own γ, β
            images = torch.cat([x, self.features])
            # fp32 from here on: on the real set these are ten thousand images by as many.
            self.between = distances(
                model.distance, images, images, modulation_of(model, images)
            ).astype(np.float32)
            if model.config.metric == "euclidean":
                np.square(self.between, out=self.between)

    def reranked(self, rows: IntArray, columns: IntArray) -> FloatArray | None:
        """Distances of one trial: its queries and gallery as rows and columns of the space."""
        if self.between is None:
            return None
        chosen = np.concatenate([rows, self.queries.size + columns])
        return k_reciprocal(self.between[np.ix_(chosen, chosen)], rows.size)


class _Trial:
    """One trial of a search: its queries and gallery among those of a `_Space`."""

    def __init__(self, space: _Space, samples: Sequence[Sample], split: Split, trial: int) -> None:
        people = np.array([sample.person_id for sample in samples])
        cameras = np.array([sample.camera for sample in samples])
        self.gallery = split.galleries[trial]
        self.rows = split.rows(trial)
        self.columns = np.searchsorted(space.pool, self.gallery)
        self._split = split
        queries = split.queries[self.rows]
        self.people = people[queries], people[self.gallery]
        self._labels = (*self.people, cameras[queries], cameras[self.gallery])
        self.excluded = excluded_pairs(*self._labels, split.protocol)

    def of(self, matrix: FloatArray) -> FloatArray:
        """Of a space's Q×N the entries of this trial."""
        asked = matrix if self._split.asked is None else matrix[self.rows]
        return np.take(asked, self.columns, axis=1)

    def scores(self, distance: FloatArray) -> QueryScores:
        """Of all queries of the search; those that the trial does not ask are not answerable."""
        scores = score_queries(distance, *self._labels, self._split.protocol)
        if self._split.asked is None:
            return scores
        return scores.placed(self.rows, self._split.queries.size)


def _score_split(space: _Space, samples: Sequence[Sample], split: Split) -> SplitScores:
    modulated, unmodulated, raw, reranked, changes = [], [], [], [], []
    nearest: IntArray | None = None
    open_set: dict[str, list[OpenSetTrial]] = {name: [] for name in space.open_set_scores}
    for number in range(len(split.galleries)):
        trial = _Trial(space, samples, split, number)
        with_modulation, without = trial.of(space.modulated), trial.of(space.unmodulated)
        modulated.append(trial.scores(with_modulation))
        unmodulated.append(trial.scores(without))
        if space.raw is not None:
            raw.append(trial.scores(trial.of(space.raw)))
        again = space.reranked(trial.rows, trial.columns)
        if again is not None:
            reranked.append(trial.scores(again))
        changes.append(top_changes(with_modulation, without, trial.excluded))
        for name, score in space.open_set_scores.items():
            open_set[name].append(
                open_set_trial(trial.of(score), *trial.people, trial.excluded, number)
            )
        if nearest is None:
            found = trial.gallery[nearest_kept(with_modulation, trial.excluded, NEAREST_KEPT)]
            nearest = np.zeros((split.queries.size, found.shape[1]), dtype=np.int64)
            nearest[trial.rows] = found
    people = np.array([sample.person_id for sample in samples])
    assert nearest is not None  # a search has at least one trial
    everyone = np.concatenate([split.queries, *split.galleries])
    return SplitScores(
        split=split,
        identities=np.unique(people[everyone]).size,
        query_people=people[split.queries],
        modulated=modulated,
        unmodulated=unmodulated,
        raw=raw or None,
        reranked=reranked if space.between is not None else None,
        gamma_beta=gamma_beta_figures(space.modulation, space.features),
        top_changes=changes,
        nearest=nearest,
        open_set=open_set,
    )


def modulation_of(model: CMT, queries: Tensor) -> Modulation:
    """γ, β of queries Q×P×D, Q×D each, fp32 on the CPU."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        return Modulation(*(part.float().cpu() for part in model.modulation(queries.to(device))))


def distances(
    distance: Distance, queries: Tensor, gallery: Tensor, modulation: Modulation
) -> FloatArray:
    """Queries Q×P×D against gallery N×P×D → Q×N, in blocks of queries.

    In float64: c − ⟨w, z⟩ (see `model.modulation`) cancels where the distance is small.
    """
    blocks = (
        distance(x.double(), gallery.double(), Modulation(gamma.double(), beta.double()))
        for x, gamma, beta in zip(
            torch.split(queries, QUERY_BLOCK),
            torch.split(modulation.gamma, QUERY_BLOCK),
            torch.split(modulation.beta, QUERY_BLOCK),
            strict=True,
        )
    )
    return torch.cat(list(blocks)).numpy()
