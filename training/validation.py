"""Early validation on held-out identities of the training side, by the dataset's own protocol."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from model import CMT
from training.datasets.sample import DatasetError, DatasetName, Sample
from training.evaluation.protocols import protocol_splits
from training.evaluation.report import evaluate_model

Selection = Literal["last", "val"]

_INTERVAL = re.compile(r"(\d+)\s*(steps?|epochs?)?")


@dataclass(frozen=True)
class Interval:
    """An interval of `number` steps, or epochs."""

    number: int
    epochs: bool

    @classmethod
    def parse(cls, text: str) -> Interval:
        """ "500", "500 steps" or "5 epochs"; ValueError for anything else."""
        found = _INTERVAL.fullmatch(text.strip())
        if found is None or int(found[1]) == 0:
            raise ValueError(f"{text!r} is no interval; write for example '5 epochs' or '500'")
        return cls(int(found[1]), (found[2] or "").startswith("epoch"))

    def steps(self, epoch: int) -> int:
        """In steps, of which an epoch has `epoch`."""
        return self.number * (epoch if self.epochs else 1)


@dataclass(frozen=True)
class Validation:
    """The images of the held-out identities, and how often they are searched.

    On SYSU-MM01 all-search single-shot with seeded galleries; else the mean over both directions.
    """

    dataset: DatasetName
    samples: Sequence[Sample]
    every: Interval

    @property
    def identities(self) -> list[int]:
        """The held-out people, ascending."""
        return sorted({sample.person_id for sample in self.samples})

    def figures(self, model: CMT) -> dict[str, float]:
        """rank_1, map, map_unmodulated: fractions, of `model` in evaluation mode and fp32.

        Raises DatasetError where an image cannot be decoded, ValueError where no query has a
        positive or the network's output is not finite.
        """
        splits = protocol_splits(self.dataset, self.samples)
        if self.dataset is DatasetName.SYSU:
            splits = splits[:1]
        found = evaluate_model(self.dataset, model, self.samples, splits).splits
        return {
            "rank_1": float(np.mean([split.modulated.rank_1.mean for split in found])),
            "map": float(np.mean([split.modulated.mean_ap.mean for split in found])),
            "map_unmodulated": float(np.mean([split.unmodulated.mean_ap.mean for split in found])),
        }


def drawn_identities(samples: Sequence[Sample], share: float) -> set[int]:
    """A share of the identities, at least two; runs of all seeds are validated on the same people.

    share: in [0, 1].
    Raises DatasetError where fewer than two would be left to train on.
    """
    people = sorted({sample.person_id for sample in samples})
    number = max(2, round(share * len(people)))
    if len(people) - number < 2:
        raise DatasetError(
            f"{len(people)} identities are too few to hold {number} of them out; give more people "
            "or train with --selection last"
        )
    return set(np.random.default_rng(0).choice(people, number, replace=False).tolist())


def without(samples: Sequence[Sample], people: Collection[int]) -> list[Sample]:
    """The samples of everyone else."""
    return [sample for sample in samples if sample.person_id not in people]
