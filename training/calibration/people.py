"""Held-out people of one or more sets, embedded: what everything in a calibration is fitted on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from training.datasets import DatasetName, Sample
from training.evaluation.embedding import Embedded
from training.evaluation.metrics import BoolArray, IntArray, Protocol
from training.evaluation.protocols import protocol_of


@dataclass(frozen=True)
class HeldOut:
    """N images of all sets together.

    dataset: the layout of all sets. samples: with numbers of people that differ between the sets.
    embedding: N×P×D. people, cameras, infrared, sets: of each image; the last its set's number.
    """

    dataset: DatasetName
    samples: list[Sample]
    embedding: Tensor
    people: IntArray
    cameras: IntArray
    infrared: BoolArray
    sets: IntArray

    @property
    def protocol(self) -> Protocol:
        """Whose rules leave pairs out."""
        return protocol_of(self.dataset)

    def folds(self) -> list[IntArray]:
        """Rows of groups of people to cross-validate between: the sets, or two halves of one."""
        if (count := int(self.sets.max()) + 1) > 1:
            return [np.flatnonzero(self.sets == number) for number in range(count)]
        people = np.unique(self.people).tolist()
        random.Random(0).shuffle(people)
        halves = (people[::2], people[1::2])
        return [np.flatnonzero(np.isin(self.people, half)) for half in halves]

    def rows(self, chosen: IntArray) -> Tensor:
        """Their embeddings."""
        return self.embedding[torch.from_numpy(chosen)]


def together(sets: Sequence[Embedded], dataset: DatasetName) -> HeldOut:
    """The images of all sets, none of whose people is in two of them."""
    numbers = {
        who: number
        for number, who in enumerate(
            sorted({(i, s.person_id) for i, one in enumerate(sets) for s in one.samples})
        )
    }
    samples = [
        replace(sample, person_id=numbers[i, sample.person_id])
        for i, one in enumerate(sets)
        for sample in one.samples
    ]
    return HeldOut(
        dataset=dataset,
        samples=samples,
        embedding=torch.cat([one.embedding for one in sets]),
        people=np.array([sample.person_id for sample in samples]),
        cameras=np.array([sample.camera for sample in samples]),
        infrared=np.array([sample.modality == "ir" for sample in samples]),
        sets=np.repeat(np.arange(len(sets)), [len(one.samples) for one in sets]),
    )
