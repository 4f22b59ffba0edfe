"""One network on the searches of a protocol: every query scored under each way of ranking."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import CMT, Calibration, Modality, Modulation, modulation_of
from model.calibration import moments_over, normalised
from model.ranking import Moments
from training.datasets import Sample
from training.evaluation.embedding import Embedded
from training.evaluation.explained import PartAreas, part_areas
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
from training.evaluation.served import Among, ranked
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
    rankings: by the way of ranking, see `training.evaluation.ways`. "modulated" (the query's γ, β
        at the checkpoint's strength) and "unmodulated" (γ = 1, β = 0) are always there. Others are
        where they make a difference: "as_trained" is at strength 1; "mean_modulation" gives every
        query the mean γ, β of all; "raw" has raw part features F in the place of the complete
        ones, unmodulated; "without_mirror" or "with_mirror" is what the checkpoint does not do;
        "score" and "unmodulated_score" are of galleries of both modalities, whose distances do
        not compare; "reranked_as_served" is what a service answers; "reranked" is all queries and
        the gallery at once, as published.
    gamma_beta: mean γ, its deviation over queries, ‖β‖/‖y‖ (see `ModulationDiagnostics`), of what
        "modulated" ranks with.
    top_changes: shares of queries whose nearest ten modulation changes, or changes or reorders.
    nearest: Q×10 indices of the samples that rank first in the first trial, modulated; of no
        meaning for queries that it does not ask.
    open_set: trials of open-set identification by the name of the score: "modulated distance",
        "unmodulated distance" and, where the checkpoint has a calibration for this search,
        "modulated calibrated" and "unmodulated calibrated"; in galleries of both modalities
        "modulated score" and "unmodulated score".
    explained: what `parts` and `agreement` of first answers say, of every trial that has both
        right and wrong ones; none without a fit of agreement for this search.
    """

    split: Split
    identities: int
    query_people: IntArray
    rankings: dict[str, list[QueryScores]]
    gamma_beta: tuple[float, float, float]
    top_changes: list[tuple[float, float]]
    nearest: IntArray
    open_set: dict[str, list[OpenSetTrial]]
    explained: list[PartAreas]

    @property
    def modulated(self) -> list[QueryScores]:
        """With the query's γ, β; in a gallery of both modalities by distance too."""
        return self.rankings["modulated"]

    @property
    def unmodulated(self) -> list[QueryScores]:
        """With γ = 1, β = 0."""
        return self.rankings["unmodulated"]

    @property
    def compared(self) -> tuple[list[QueryScores], list[QueryScores]]:
        """With and without γ, β, as the answer is ordered: by score where modalities are mixed."""
        if self.split.mixed:
            return self.rankings["score"], self.rankings["unmodulated_score"]
        return self.modulated, self.unmodulated


def score_splits(
    model: CMT,
    embedded: Embedded,
    splits: Sequence[Split],
    *,
    rerank: bool = False,
    calibration: Calibration | None = None,
    judged: bool = True,
    other: Embedded | None = None,
) -> list[SplitScores]:
    """Score every search, computing distances once for searches with the same queries.

    calibration: the checkpoint's. judged: whether open-set identification is by its scores, too.
    other: the same images embedded with the mirror image where the configuration has none, else
    without.
    Raises ValueError where the network's output is not finite.
    """
    by_queries = defaultdict(list)
    for split in splits:
        by_queries[split.queries.tobytes()].append(split)
    scored = {}
    for group in by_queries.values():
        space = _Space(model, embedded, group, calibration, other, rerank=rerank, judged=judged)
        for split in group:
            scored[id(split)] = _score_split(space, embedded.samples, split)
    return [scored[id(split)] for split in splits]


class Trial:
    """One trial of a search.

    gallery: its images. rows: the places of its queries among those of the search. columns: of its
    gallery among those of all trials. people: of both. excluded: pairs that the protocol leaves
    out.
    """

    def __init__(
        self, samples: Sequence[Sample], split: Split, number: int, pool: IntArray
    ) -> None:
        """pool: the images of all trials, ascending."""
        people = np.array([sample.person_id for sample in samples])
        cameras = np.array([sample.camera for sample in samples])
        self.gallery = split.galleries[number]
        self.rows = split.rows(number)
        self.columns = np.searchsorted(pool, self.gallery)
        self._split = split
        queries = split.queries[self.rows]
        self.people = people[queries], people[self.gallery]
        self._labels = (*self.people, cameras[queries], cameras[self.gallery])
        self.excluded = excluded_pairs(*self._labels, split.protocol)

    def of(self, matrix: FloatArray) -> FloatArray:
        """Of all queries × pool, the entries of this trial."""
        asked = matrix if self._split.asked is None else matrix[self.rows]
        return np.take(asked, self.columns, axis=1)

    def scores(self, distance: FloatArray) -> QueryScores:
        """Of all queries of the search; those that the trial does not ask are not answerable."""
        scores = score_queries(distance, *self._labels, self._split.protocol)
        if self._split.asked is None:
            return scores
        return scores.placed(self.rows, self._split.queries.size)


class _Space:
    """Distances from a set of queries to every image that any gallery of theirs uses."""

    def __init__(
        self,
        model: CMT,
        embedded: Embedded,
        splits: Sequence[Split],
        calibration: Calibration | None,
        other: Embedded | None,
        *,
        rerank: bool,
        judged: bool,
    ) -> None:
        self.mixed = splits[0].mixed
        self.queries = splits[0].queries
        self.pool = np.unique(np.concatenate([g for split in splits for g in split.galleries]))
        self.x = x = embedded.embedding[torch.from_numpy(self.queries)]
        self.features = embedded.embedding[torch.from_numpy(self.pool)]
        self.modulation = modulation_of(model, x)
        identity = Modulation.identity(*self.modulation.gamma.shape)
        self.distances: dict[str, FloatArray] = {}  # by the way of ranking

        def add(way: str, of: Tensor, modulation: Modulation) -> None:
            rows, columns = (of[torch.from_numpy(places)] for places in (self.queries, self.pool))
            self.distances[way] = distances(model.distance, rows, columns, modulation)

        add("modulated", embedded.embedding, self.modulation)
        add("unmodulated", embedded.embedding, identity)
        if model.config.instance_alignment:
            if model.strength is not None and model.strength.s != 1:
                with _as_trained(model):
                    add("as_trained", embedded.embedding, modulation_of(model, x))
            add("mean_modulation", embedded.embedding, mean_modulation(self.modulation))
        if other is not None:
            way = "without_mirror" if model.config.mirror else "with_mirror"
            seen = other.embedding[torch.from_numpy(self.queries)]
            add(way, other.embedding, modulation_of(model, seen))
        if embedded.compensated is not None:
            add("raw", model.ranked_form(embedded.features), identity)

        self.modalities = np.array([embedded.samples[i].modality for i in self.pool])
        self.query_modality = embedded.samples[self.queries[0]].modality
        self.calibration = calibration
        self.facts = calibration.facts.ranking if calibration else None
        self._model = model
        self.priors: dict[str, list[dict[Modality, Moments]]] = {
            way: [{}] * self.queries.size for way in ("modulated", "unmodulated")
        }
        self.open_set_scores = (
            {}
            if self.mixed
            else {f"{way} distance": self.distances[way] for way in ("modulated", "unmodulated")}
        )
        for name, modulation in (("modulated", self.modulation), ("unmodulated", identity)):
            if calibration is None:
                continue
            measured = calibration.measured(x, modulation)
            if self.facts:
                self.priors[name] = moments_over(measured)
            chosen = calibration.map_of(
                *(self.query_modality, self.modalities[0]), modulated=name == "modulated"
            )
            if chosen and judged and not self.mixed:
                # The score and not the probability: the same order, without the steps of a curve.
                self.open_set_scores[f"{name} calibrated"] = normalised(
                    self.distances[name], measured[chosen.gallery], chosen.normalisation
                )
        self._all: npt.NDArray[np.float32] | None = None
        if rerank:  # every image in its turn as the query, with its own γ, β
            images = torch.cat([x, self.features])
            # fp32 from here on: on the real set these are ten thousand images by as many.
            self._all = distances(
                model.distance, images, images, modulation_of(model, images)
            ).astype(np.float32)
            if model.config.metric == "euclidean":
                np.square(self._all, out=self._all)

    @cached_property
    def between(self) -> npt.NDArray[np.float32]:
        """Unmodulated distances among the images of all galleries."""
        identity = Modulation.identity(len(self.features), self.features.shape[2])
        found = distances(self._model.distance, self.features, self.features, identity)
        return found.astype(np.float32)

    def reranked(self, rows: IntArray, columns: IntArray) -> FloatArray | None:
        """Distances of one trial: its queries and gallery as rows and columns of the space."""
        if self._all is None:
            return None
        chosen = np.concatenate([rows, self.queries.size + columns])
        return k_reciprocal(self._all[np.ix_(chosen, chosen)], rows.size)

    def served(self, trial: Trial, way: str, *, rerank: bool) -> FloatArray:
        """What a service orders each query's answer by, smaller is nearer: Q×N.

        Images that the protocol leaves out for a query are not searched, and infinitely far.
        """
        matrix, priors = trial.of(self.distances[way]), self.priors[way]
        modalities, people = self.modalities[trial.columns], trial.people[1]
        ordered = np.full(matrix.shape, np.inf)
        for row, query in enumerate(trial.rows.tolist()):
            items = np.flatnonzero(~trial.excluded[row])
            if not items.size:
                continue
            found = ranked(
                *(matrix[row, items], modalities[items], people[items]),
                query=self.query_modality,
                facts=self.facts,
                prior=priors[query],
                between=Among(self.between, trial.columns[items]) if rerank else None,
            )
            ordered[row, items] = -found.scores
        return ordered

    def explained(self, trial: Trial, first: IntArray, number: int) -> PartAreas | None:
        """What parts and agreement say of first answers, given as places in a trial's gallery.

        None where they say nothing.
        """
        if self.calibration is None:
            return None
        asked = np.flatnonzero(~trial.excluded.all(axis=1))
        rows, chosen = trial.rows[asked], first[asked]
        columns = trial.columns[chosen]
        return part_areas(
            self.calibration,
            self.x[torch.from_numpy(rows)],
            self.features[torch.from_numpy(columns)],
            self.distances["modulated"][rows, columns],
            trial.people[0][asked] == trial.people[1][chosen],
            query=self.query_modality,
            gallery=self.modalities[columns].tolist(),
            seed=number,
        )


def _score_split(space: _Space, samples: Sequence[Sample], split: Split) -> SplitScores:
    rankings: dict[str, list[QueryScores]] = defaultdict(list)
    open_set: dict[str, list[OpenSetTrial]] = defaultdict(list)
    changes: list[tuple[float, float]] = []
    explained: list[PartAreas] = []
    nearest: IntArray | None = None
    for number in range(len(split.galleries)):
        trial = Trial(samples, split, number, space.pool)
        for way, matrix in space.distances.items():
            rankings[way].append(trial.scores(trial.of(matrix)))
        judges = {name: trial.of(score) for name, score in space.open_set_scores.items()}
        with_modulation, without = (
            trial.of(space.distances[way]) for way in ("modulated", "unmodulated")
        )
        if split.mixed:
            with_modulation, without = (
                space.served(trial, way, rerank=False) for way in ("modulated", "unmodulated")
            )
            judges |= {"modulated score": with_modulation, "unmodulated score": without}
            rankings["score"].append(trial.scores(with_modulation))
            rankings["unmodulated_score"].append(trial.scores(without))
        if space.facts and space.facts.reranking:
            answers = space.served(trial, "modulated", rerank=True)
            rankings["reranked_as_served"].append(trial.scores(answers))
        again = space.reranked(trial.rows, trial.columns)
        if again is not None:
            rankings["reranked"].append(trial.scores(again))
        changes.append(top_changes(with_modulation, without, trial.excluded))
        for name, score in judges.items():
            open_set[name].append(open_set_trial(score, *trial.people, trial.excluded, number))
        best = nearest_kept(with_modulation, trial.excluded, NEAREST_KEPT)
        areas = space.explained(trial, best[:, 0], number)
        if areas is not None:
            explained.append(areas)
        if nearest is None:
            found = trial.gallery[best]
            nearest = np.zeros((split.queries.size, found.shape[1]), dtype=np.int64)
            nearest[trial.rows] = found
    people = np.array([sample.person_id for sample in samples])
    assert nearest is not None  # a search has at least one trial
    everyone = np.concatenate([split.queries, *split.galleries])
    return SplitScores(
        split=split,
        identities=np.unique(people[everyone]).size,
        query_people=people[split.queries],
        rankings=dict(rankings),
        gamma_beta=gamma_beta_figures(space.modulation, space.features),
        top_changes=changes,
        nearest=nearest,
        open_set=dict(open_set),
        explained=explained,
    )


@contextmanager
def _as_trained(model: CMT) -> Iterator[None]:
    """γ, β at strength 1."""
    strength, model.strength = model.strength, None
    try:
        yield
    finally:
        model.strength = strength


def mean_modulation(modulation: Modulation) -> Modulation:
    """Every query's γ, β replaced by their mean over the queries: Q×D each."""
    return Modulation(*(part.mean(dim=0, keepdim=True).expand_as(part) for part in modulation))


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
