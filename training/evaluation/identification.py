"""Do answers say how sure one may be? Searches in an open set, judged by their probabilities.

Galleries of visible crops, of infrared ones and of both, of few and of many people, with labels and
without. In each of ten trials half of the people are enrolled, drawn with the trial's number as the
seed, with one to four crops each, from different cameras as far as there are some; the same trials
with blocks of twenty people make the small galleries. Everybody's crops of the other modality ask,
in a mixed gallery those of both. Left out is what the data set's protocol leaves out, and for every
query its own person by its own camera: neighbouring frames would make the search look easy.

Answers are those of the service, re-ranked where the checkpoint says so, at even odds of being
enrolled, which is what half of the people are. FPIR and FNIR are the false-positive and
false-negative identification rates of ISO/IEC 19795: at "likely", the share of searches for people
not enrolled whose first answer has at least that probability, and of searches for enrolled ones
where it has not or is somebody else; at "none", the share of the former that are not answered by
`match` "none", and of the latter that are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from model import CMT, Calibration, Modulation, modulation_of
from model.calibration import moments_over
from model.config import MODALITIES
from training.evaluation.embedding import Embedded
from training.evaluation.metrics import BoolArray, FloatArray, IntArray, Protocol, excluded_pairs
from training.evaluation.scoring import distances
from training.evaluation.served import Among, answer, ranked
from training.evaluation.splits import TRIALS, seeded_gallery

GALLERIES = {"visible": ("rgb",), "infrared": ("ir",), "mixed": MODALITIES}
ASKING = {"visible": ("ir",), "infrared": ("rgb",), "mixed": MODALITIES}
FEW = 10  # people enrolled in a small gallery, at most
MOST_IMAGES = 4  # of a person
QUERIES = 200  # of a trial and kind of gallery, at most
LIKELY, NONE = 0.8, 0.2  # the cut-offs of `match` that a service has by default
BINS = 10


class Kind(NamedTuple):
    """gallery: a key of `GALLERIES`. small: at most `FEW` people. labelled: whether items are."""

    gallery: str
    small: bool
    labelled: bool

    def __str__(self) -> str:
        size, labels = ("small" if self.small else "large"), ("" if self.labelled else "un")
        return f"{self.gallery}, {size}, {labels}labelled"


@dataclass(frozen=True)
class Answers:
    """S searches of one kind.

    first: probability of the first answer. right: whether it shows the person asked for. enrolled:
    probability that the person is enrolled. present: whether the gallery shows them. people,
    items: of the gallery.
    """

    first: FloatArray
    right: BoolArray
    enrolled: FloatArray
    present: BoolArray
    people: IntArray
    items: IntArray

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """All of them."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True)
class ErrorRates:
    """None where no search can tell."""

    fpir: float | None
    fnir: float | None


@dataclass(frozen=True)
class Bin:
    """One of ten equal bins of predicted probability; predicted, observed: None if it is empty."""

    searches: int
    predicted: float | None
    observed: float | None


@dataclass(frozen=True)
class Identification:
    """What the searches of one kind of gallery say; see the module.

    people, items: of the gallery, mean. mated: searches for somebody who is there. right: share of
    first answers that are.
    calibration_error: of the first answer, the mean over all searches of how far predicted and
    observed are apart in their bin. brier: its mean squared error. likely, none: at the cut-offs.
    """

    gallery: str
    small: bool
    labelled: bool
    people: float
    items: float
    searches: int
    mated: int
    right: float
    calibration_error: float
    brier: float
    likely: ErrorRates
    none: ErrorRates
    bins: list[Bin]

    @property
    def title(self) -> str:
        """In words."""
        return str(Kind(self.gallery, self.small, self.labelled))


def identification(kind: Kind, answers: Answers) -> Identification:
    """The figures of at least one search."""
    first, right, present = answers.first, answers.right, answers.present
    bins = reliability(first, right)
    alarm, answered = first >= LIKELY, answers.enrolled >= NONE
    return Identification(
        *kind,
        people=float(answers.people.mean()),
        items=float(answers.items.mean()),
        searches=first.size,
        mated=int(present.sum()),
        right=float(right.mean()),
        calibration_error=calibration_error(bins),
        brier=float(np.square(first - right).mean()),
        likely=ErrorRates(_share(alarm[~present]), _share(~(alarm & right)[present])),
        none=ErrorRates(_share(answered[~present]), _share(~answered[present])),
        bins=bins,
    )


def reliability(predicted: FloatArray, observed: BoolArray) -> list[Bin]:
    """Probabilities and what came true → ten equal bins."""
    places = np.minimum((predicted * BINS).astype(np.int64), BINS - 1)
    chosen = [places == place for place in range(BINS)]
    return [
        Bin(int(of_bin.sum()), _share(predicted[of_bin]), _share(observed[of_bin]))
        for of_bin in chosen
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected one: |predicted − observed| of each bin, weighted by its searches."""
    apart = [abs((b.predicted or 0.0) - (b.observed or 0.0)) for b in bins]
    return float(np.average(apart, weights=[b.searches for b in bins]))


def _share(values: FloatArray | BoolArray) -> float | None:
    return float(values.mean()) if values.size else None


def open_set_answers(
    model: CMT, embedded: Embedded, protocol: Protocol, calibration: Calibration | None
) -> dict[Kind, Answers]:
    """Ten trials of every kind of gallery; none where the checkpoint has no fits of probabilities.

    Kinds that the images do not allow are left out.
    """
    facts = calibration.facts.ranking if calibration else None
    if calibration is None or facts is None or not facts.posteriors:
        return {}
    asked = _Asked(model, embedded, protocol, calibration)
    found: dict[Kind, Answers] = {}
    for gallery in GALLERIES:
        for small in (True, False):
            drawn: dict[bool, list[Answers]] = {True: [], False: []}
            for trial in range(TRIALS):
                for enrolled, queries in asked.searches(gallery, trial, small=small):
                    for labelled, parts in drawn.items():
                        parts += asked.answers(enrolled, queries, labelled=labelled)
            for labelled, parts in drawn.items():
                if parts:
                    found[Kind(gallery, small, labelled)] = Answers.joined(parts)
    return found


class _Asked:
    """Searches among the images of an evaluation."""

    def __init__(
        self, model: CMT, embedded: Embedded, protocol: Protocol, calibration: Calibration
    ) -> None:
        assert calibration.facts.ranking is not None
        self._model, self._protocol, self._calibration = model, protocol, calibration
        self._facts = calibration.facts.ranking
        self._samples, self._embedding = embedded.samples, embedded.embedding
        self._people = np.array([sample.person_id for sample in embedded.samples])
        self._cameras = np.array([sample.camera for sample in embedded.samples])
        self._modalities = np.array([sample.modality for sample in embedded.samples])
        reranking = self._facts.reranking
        self._rerank = reranking is not None and reranking.default

    def searches(
        self, gallery: str, trial: int, *, small: bool
    ) -> Iterator[tuple[IntArray, IntArray]]:
        """Galleries and their queries, as indices of images."""
        generator = np.random.default_rng(trial)
        everyone = generator.permutation(np.unique(self._people))
        blocks = -(-everyone.size // (2 * FEW)) if small else 1
        if not small and everyone.size <= 2 * FEW:
            return  # the small galleries are all there are
        asking = np.flatnonzero(np.isin(self._modalities, ASKING[gallery]))
        asking = np.sort(generator.permutation(asking)[:QUERIES])
        for block in np.array_split(everyone, blocks):
            chosen = block[: (block.size + 1) // 2]
            enrolled = self._enrolled(gallery, trial, chosen, generator)
            queries = asking[np.isin(self._people[asking], block)]
            if enrolled.size and queries.size:
                yield enrolled, queries

    def _enrolled(
        self, gallery: str, trial: int, people: IntArray, generator: np.random.Generator
    ) -> IntArray:
        """Crops of the people, each from another camera or modality: 1 to `MOST_IMAGES` a person,
        by the trial."""
        crops = []
        for modality in GALLERIES[gallery]:
            of_kind = (self._modalities == modality) & np.isin(self._people, people)
            crops.append(seeded_gallery(self._samples, np.flatnonzero(of_kind), trial))
        drawn = generator.permutation(np.concatenate(crops).astype(np.int64))
        seen: dict[int, int] = {}
        kept = []
        for i in drawn.tolist():
            person = int(self._people[i])
            seen[person] = seen.get(person, 0) + 1
            if seen[person] <= 1 + trial % MOST_IMAGES:
                kept.append(i)
        return np.array(sorted(kept), dtype=np.int64)

    def answers(self, enrolled: IntArray, queries: IntArray, *, labelled: bool) -> list[Answers]:
        """What the service answers to each query in this gallery."""
        x, y = (self._embedding[torch.from_numpy(rows)] for rows in (queries, enrolled))
        modulation = modulation_of(self._model, x)
        matrix = distances(self._model.distance, x, y, modulation)
        identity = Modulation.identity(len(y), y.shape[2])
        between = distances(self._model.distance, y, y, identity)
        priors = moments_over(self._calibration.measured(x, modulation))
        excluded = self._excluded(queries, enrolled)
        found = []
        for row, query in enumerate(queries.tolist()):
            items = np.flatnonzero(~excluded[row])
            if not items.size:
                continue
            owners = self._people[enrolled[items]]
            named = np.unique(owners, return_inverse=True)[1]
            people = named if labelled else np.full(items.size, -1)
            searched = ranked(
                *(matrix[row, items], self._modalities[enrolled[items]], people),
                query=str(self._modalities[query]),
                facts=self._facts,
                prior=priors[row],
                between=Among(between, items) if self._rerank else None,
            )
            said = answer(searched, people, self._facts, modulated=True)
            if said is None:
                return []
            first = int(searched.scores.argmax())
            own = owners == self._people[query]
            found.append(
                Answers(
                    first=said.probabilities[[first]],
                    right=own[[first]],
                    enrolled=np.array([said.enrolled]),
                    present=np.array([own.any()]),
                    people=np.array([named.max() + 1]),
                    items=np.array([items.size]),
                )
            )
        return found

    def _excluded(self, queries: IntArray, enrolled: IntArray) -> BoolArray:
        """Q×N: by the protocol, and one's own person by one's own camera."""
        rows, columns = queries[:, None], enrolled[None]
        same = self._people[rows] == self._people[columns]
        same &= self._cameras[rows] == self._cameras[columns]
        same &= self._modalities[rows] == self._modalities[columns]
        labels = (
            *(self._people[queries], self._people[enrolled]),
            *(self._cameras[queries], self._cameras[enrolled]),
        )
        return np.asarray(same | excluded_pairs(*labels, self._protocol))


def identifications(models: Sequence[Mapping[Kind, Answers]]) -> list[Identification]:
    """The figures of each kind over all models; kinds that some model lacks are left out."""
    kinds = [kind for kind in models[0] if all(kind in model for model in models)]
    return [
        identification(kind, Answers.joined([model[kind] for model in models])) for kind in kinds
    ]
