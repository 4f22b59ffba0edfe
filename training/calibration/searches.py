"""Random searches among held-out people, as a service sees them.

Galleries of few and of many people (drawn evenly in the logarithm), of one kind of camera or both,
with one to four images of each; queries of one to four images; and the person asked for is not
there half of the time. Images that the data set's protocol leaves out are not in a gallery, nor are
those of the person asked for by the camera of the query: often neighbouring frames, they would make
the search look easier than it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model import CMT, Modality, Modulation, modulation_of
from model.calibration import FloatArray, moments_over, reference_distances
from model.config import MODALITIES
from model.ranking import Moments, RankingFacts, Reranking, Searched, combined, reranked
from training.calibration.pairs import reference_count, spread_out
from training.calibration.people import HeldOut
from training.evaluation.metrics import BoolArray, IntArray, Protocol, excluded_pairs
from training.evaluation.scoring import distances

GALLERIES = (*MODALITIES, "mixed")
FEWEST, FEW = 5, 10  # people in a gallery, at least as a rule; in a small one at most
MOST_IMAGES = 4  # of a person in a gallery, and of a query
# By the gallery (visible: for an infrared query), by its people, and by the images of the query.
KINDS = (
    *("visible", "infrared", "mixed", "same kind"),
    *("fewer than 5", "5 to 10", "more people", "several images"),
)
_TINY = 0.15  # of the galleries have fewer people than FEWEST
_SEVERAL = 0.4  # of the queries have more than one image
_TRIES = 50


@dataclass(frozen=True)
class Search:
    """One search.

    query: its place among the queries of its fold. modality: of the query. gallery: "rgb", "ir" or
    "mixed". items: the gallery's images, as places in the fold. people: how many it shows. images:
    of the query. asked: the person asked for. present: whether the gallery shows them.
    """

    query: int
    modality: Modality
    gallery: str
    items: IntArray
    people: int
    images: int
    asked: int
    present: bool

    @property
    def kind(self) -> str:
        """What is searched, one of the first four of `KINDS`."""
        if self.gallery == "mixed":
            return "mixed"
        if self.gallery == self.modality:
            return "same kind"
        return "visible" if self.gallery == "rgb" else "infrared"

    @property
    def kinds(self) -> set[str]:
        """Which of `KINDS` it is."""
        found = {self.kind}
        if self.people < FEWEST:
            found.add("fewer than 5")
        elif self.people <= FEW:
            found.add("5 to 10")
        else:
            found.add("more people")
        if self.images > 1:
            found.add("several images")
        return found


@dataclass(frozen=True)
class Scored:
    """What a search finds: scores of its items, whose they are, and of `Searched` what it says."""

    search: Search
    scores: FloatArray
    people: IntArray
    ratio: float
    own: float
    raised: float = 0.0

    def searched(self, *, labelled: bool) -> Searched:
        """What the posterior is told of it."""
        items = len(self.scores)
        return Searched(
            people=self.search.people if labelled else items,
            items=items,
            unlabelled=0 if labelled else items,
            own=self.own,
            ratio=self.ratio,
            images=self.search.images,
            raised=self.raised,
        )


class Fold:
    """Searches among the people of one fold.

    References are of the other folds: as in a service, they show other people and cameras.
    """

    def __init__(self, model: CMT, held_out: HeldOut, rows: IntArray) -> None:
        """rows: of the fold's images."""
        self._model = model
        self.images = held_out.rows(rows)
        self.people, self.cameras = held_out.people[rows], held_out.cameras[rows]
        self.modalities = np.where(held_out.infrared[rows], "ir", "rgb")
        self._normalise = model.config.normalise_test
        self.protocol: Protocol = held_out.protocol
        self.searches: list[Search] = []
        self.queries = self.images[:0]
        others = np.setdiff1d(np.arange(len(held_out.samples)), rows)
        samples = [held_out.samples[i] for i in others.tolist()]
        count = reference_count(model.config.embedding_size)
        self.references = {
            m: held_out.rows(others[spread_out(samples, m, count)]).half() for m in MODALITIES
        }
        identity = Modulation.identity(len(rows), self.images.shape[2])
        self.between = distances(model.distance, self.images, self.images, identity)
        self._found: dict[bool, tuple[FloatArray, list[dict[Modality, Moments]]]] = {}

    def asking(self, searches: Sequence[tuple[Search, IntArray]]) -> Fold:
        """The same people with these searches, each with the places of its query's images."""
        other = copy(self)
        other.searches = [search for search, _ in searches]
        means = torch.stack(
            [self.images[torch.from_numpy(images)].mean(0) for _, images in searches]
        )
        if self._normalise:  # several images count as one query, as in the service
            means = functional.normalize(means.flatten(1), dim=1).view_as(means)
        other.queries, other._found = means, {}
        return other

    def modulation(self, x: Tensor, *, modulated: bool) -> Modulation:
        """γ, β of queries, or those that change nothing."""
        if modulated:
            return modulation_of(self._model, x)
        return Modulation.identity(len(x), x.shape[2])

    def distances(self, *, modulated: bool) -> tuple[FloatArray, list[dict[Modality, Moments]]]:
        """Of the queries to all images of the fold, and their moments over the references."""
        if modulated not in self._found:
            x = self.queries
            modulation = self.modulation(x, modulated=modulated)
            measured = {
                modality: reference_distances(x, modulation, rows, self._model.config.metric)
                for modality, rows in self.references.items()
            }
            matrix = distances(self._model.distance, x, self.images, modulation)
            self._found[modulated] = matrix, moments_over(measured)
        return self._found[modulated]

    def scored(self, prior_items: float, *, modulated: bool) -> list[Scored]:
        """Every search by distance alone."""
        matrix, moments = self.distances(modulated=modulated)
        found = []
        for search in self.searches:
            names = self.modalities[search.items]
            row = matrix[search.query, search.items]
            scores, ratio = combined(row, names, moments[search.query], prior_items)
            own = float((names == search.modality).mean())
            found.append(Scored(search, scores, self.people[search.items], ratio, own))
        return found

    def reranked(
        self, scored: Scored, facts: RankingFacts, reranking: Reranking, *, labelled: bool
    ) -> Scored:
        """The same search after re-ranking."""
        items = scored.search.items
        images = (
            reranking.images(len(items), scored.search.people, 0)
            if labelled
            else reranking.images(0, 0, len(items))
        )
        scores = reranked(
            scored.scores,
            self.modalities[items],
            lambda best: self.between[np.ix_(items[best], items[best])],
            facts,
            reranking,
            images,
        )
        return replace(scored, scores=scores, raised=float(scores.max() - scored.scores.max()))


class Draw:
    """Draws searches among the images of a fold, by a generator of its own."""

    def __init__(self, fold: Fold, seed: int) -> None:
        self._fold = fold
        self._generator = np.random.default_rng(seed)
        self.people = np.unique(fold.people)

    def searches(self, count: int) -> list[tuple[Search, IntArray]]:
        """`count` for each modality of the query and kind of gallery, fewer where none are found;
        each with the places of the images of its query."""
        found: list[tuple[Search, IntArray]] = []
        for modality, gallery in product(MODALITIES, GALLERIES):
            for _ in range(count):
                people = self._people()
                images = int(self._generator.integers(1, MOST_IMAGES + 1))
                present = bool(self._generator.random() < 0.5)
                shots = 1
                if self._generator.random() < _SEVERAL:
                    shots = int(self._generator.integers(2, MOST_IMAGES + 1))
                drawn = self.one(modality, gallery, people, images, shots, present, len(found))
                if drawn:
                    found.append(drawn)
        return found

    def _people(self) -> int:
        most = len(self.people) - 1  # so that the person asked for can be absent
        if most <= FEWEST or self._generator.random() < _TINY:
            return int(self._generator.integers(1, max(1, min(FEWEST, most)) + 1))
        return int(np.exp(self._generator.uniform(np.log(FEWEST), np.log(most + 1))))

    def one(
        self,
        modality: Modality,
        gallery: str,
        people: int,
        images: int,
        shots: int,
        present: bool,
        query: int,
    ) -> tuple[Search, IntArray] | None:
        """One search; None where luck finds nobody with images on both sides."""
        fold, generator = self._fold, self._generator
        mine = np.flatnonzero(fold.modalities == modality)
        kind = np.full(len(fold.people), gallery == "mixed") | (fold.modalities == gallery)
        for _ in range(_TRIES):
            asked = int(fold.people[generator.choice(mine)])
            own = mine[fold.people[mine] == asked]
            cameras = np.unique(fold.cameras[own])
            if generator.random() < 0.5:  # all images of the query by one camera
                own = own[fold.cameras[own] == generator.choice(cameras)]
            shown = generator.choice(own, min(shots, own.size), replace=False)
            allowed = kind & ~self._excluded(shown)
            allowed &= ~((fold.people == asked) & np.isin(fold.cameras, fold.cameras[shown]))
            allowed[shown] = False
            there = np.unique(fold.people[allowed])
            if asked not in there:
                continue
            others = there[there != asked]
            number = min(people - present, others.size)
            if number + present < 1:
                continue
            chosen = generator.choice(others, number, replace=False)
            if present:
                chosen = np.append(chosen, asked)
            items = self._items(allowed & np.isin(fold.people, chosen), images)
            search = Search(
                query, modality, gallery, items, chosen.size, shown.size, asked, present
            )
            return search, shown
        return None

    def _excluded(self, shown: IntArray) -> BoolArray:
        """Images that the protocol leaves out for any image of the query."""
        fold = self._fold
        labels = fold.people[shown], fold.people, fold.cameras[shown], fold.cameras
        return np.asarray(excluded_pairs(*labels, fold.protocol).any(axis=0))

    def _items(self, allowed: BoolArray, images: int) -> IntArray:
        """At most `images` of each person, at random."""
        places = self._generator.permutation(np.flatnonzero(allowed))
        order = places[np.argsort(self._fold.people[places], kind="stable")]
        owners = self._fold.people[order]
        _, starts, counts = np.unique(owners, return_index=True, return_counts=True)
        turn = np.arange(order.size) - np.repeat(starts, counts)
        return np.sort(order[turn < images])
