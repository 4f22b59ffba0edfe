"""Held-out images → pairs of a query and a gallery image, with the query's reference distances."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model import CMT, Modality, Modulation, modulation_of
from model.calibration import FloatArray, reference_distances
from model.config import MODALITIES
from training.calibration.people import HeldOut
from training.datasets import Sample
from training.evaluation.metrics import BoolArray, IntArray, excluded_pairs
from training.evaluation.scoring import distances
from training.evaluation.splits import of_modality

IMAGES = 1000  # of each modality at most: a million pairs of each kind
REFERENCE_BYTES = 1 << 20  # of both modalities together, in a checkpoint
REFERENCES = 128  # of each modality, or fewer where REFERENCE_BYTES does not allow them
FEWEST_REFERENCES = 64  # while fitting, where nothing is stored
_BYTES_OF_A_NUMBER = 2  # fp16


@dataclass(frozen=True)
class Pairs:
    """All pairs of Q queries and N gallery images that count, of one modality pair.

    distance: Q×N.
    reference: each query's distances to R images of the gallery's modality, of all people.
    reference_people: R.
    same: Q×N, whether both are of one person.
    counted: Q×N, whether the pair counts.
    query_people: Q.
    gallery_people: N.
    """

    distance: FloatArray
    reference: FloatArray
    reference_people: IntArray
    same: BoolArray
    counted: BoolArray
    query_people: IntArray
    gallery_people: IntArray


def spread_out(samples: Sequence[Sample], modality: Modality, count: int) -> IntArray:
    """Indices of at most `count` images, taken in turn from every person and camera.

    Raises DatasetError where there is no image of that modality.
    """
    cells: dict[tuple[int, int], list[int]] = {}
    for i in of_modality(samples, modality).tolist():
        cells.setdefault((samples[i].person_id, samples[i].camera), []).append(i)
    generator = random.Random(0)
    queues = [generator.sample(cells[key], len(cells[key])) for key in sorted(cells)]
    generator.shuffle(queues)  # or a small count would take only the first people
    longest = max(map(len, queues))
    turns = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return np.array(sorted(turns[:count]), dtype=np.int64)


def held_out_images(samples: Sequence[Sample]) -> list[Sample]:
    """At most a thousand images of each modality: more pairs would only cost memory.

    Raises DatasetError where a modality has no image.
    """
    chosen = np.concatenate([spread_out(samples, modality, IMAGES) for modality in MODALITIES])
    return [samples[i] for i in np.sort(chosen).tolist()]


def reference_count(embedding_size: int) -> int:
    """How many reference embeddings of each modality a checkpoint gets.

    embedding_size: numbers of one embedding, P·D.
    """
    room = REFERENCE_BYTES // (len(MODALITIES) * _BYTES_OF_A_NUMBER * embedding_size)
    return max(1, min(REFERENCES, room))


class PairMaker:
    """Pairs between embedded images, modulated by the query's γ, β or not."""

    def __init__(self, model: CMT, held_out: HeldOut) -> None:
        """Raise DatasetError where a modality is missing."""
        self._model, self._held_out = model, held_out
        self._chosen = {m: spread_out(held_out.samples, m, IMAGES) for m in MODALITIES}
        self.identities = np.unique(held_out.people).size

    def references(self, modality: Modality) -> Tensor:
        """The reference set that the checkpoint gets, R×P×D in fp16."""
        count = reference_count(self._model.config.embedding_size)
        return self._held_out.rows(spread_out(self._held_out.samples, modality, count)).half()

    def pairs(self, query: Modality, gallery: Modality, *, modulated: bool) -> Pairs:
        """Every query of one modality with every gallery image of one.

        Pairs that the dataset's protocol leaves out do not count, nor do those across two sets,
        whose cameras tell them apart. Within a modality, neither does an image with itself, nor
        images of one person by one camera where there are several: they are often neighbouring
        frames, and would make the task look easier than it is.
        """
        rows, columns = self._chosen[query], self._chosen[gallery]
        held_out, x = self._held_out, self._held_out.rows(rows)
        modulation = (
            modulation_of(self._model, x) if modulated else Modulation.identity(len(x), x.shape[2])
        )
        people, cameras, sets = held_out.people, held_out.cameras, held_out.sets
        labels = people[rows], people[columns], cameras[rows], cameras[columns]
        same = people[rows][:, None] == people[columns]
        counted = ~excluded_pairs(*labels, held_out.protocol)
        counted &= sets[rows][:, None] == sets[columns]
        if query == gallery:
            counted &= rows[:, None] != columns
            if np.unique(cameras[rows]).size > 1:
                counted &= ~(same & (cameras[rows][:, None] == cameras[columns]))
        # Only those of one half of the people are used at a time: about as many as are stored.
        count = max(FEWEST_REFERENCES, 2 * reference_count(self._model.config.embedding_size))
        referred = spread_out(held_out.samples, gallery, count)
        return Pairs(
            distance=distances(self._model.distance, x, held_out.rows(columns), modulation),
            reference=reference_distances(
                x, modulation, held_out.rows(referred), self._model.config.metric
            ),
            reference_people=people[referred],
            same=same,
            counted=counted,
            query_people=people[rows],
            gallery_people=people[columns],
        )
