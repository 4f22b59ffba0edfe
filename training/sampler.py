"""Identity-balanced batches: N identities × K images from each modality (CMT §4.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from training.datasets.sample import Sample


class TrainingSetError(ValueError):
    """A training set that cannot be trained on; the message says what is missing."""


class Batch(NamedTuple):
    """2·N·K images, visible then infrared: rows of the sample list, 0-based class, modality."""

    rows: np.ndarray
    labels: np.ndarray
    is_ir: np.ndarray


class IdentityBalancedSampler:
    """Step → batch, a pure function of (seed, step).

    A resumed run therefore draws what an uninterrupted one would have drawn, without any stored
    state. Identities are drawn without replacement from one shuffled pass after another; images of
    a person without replacement where there are enough of them.
    """

    def __init__(self, samples: Sequence[Sample], identities: int, images: int, seed: int) -> None:
        """identities N and images K per identity and modality.

        Raises TrainingSetError when someone lacks a modality, or fewer than N people are given.
        """
        rows: dict[int, dict[str, list[int]]] = defaultdict(lambda: {"rgb": [], "ir": []})
        for row, sample in enumerate(samples):
            rows[sample.person_id][sample.modality].append(row)
        lacking = {p: of for p, of in rows.items() if not (of["rgb"] and of["ir"])}
        for person, of in lacking.items():
            word, there = ("infrared", of["rgb"]) if of["rgb"] else ("visible", of["ir"])
            raise TrainingSetError(
                f"identity {person} ({samples[there[0]].path.parent}) has no {word} image "
                f"({len(lacking)} of {len(rows)} identities lack one modality): add images, or "
                "list the others in a file for --train-ids"
            )
        if len(rows) < identities:
            raise TrainingSetError(
                f"{len(rows)} identities are fewer than the {identities} of one batch; give more "
                "people or a smaller batch"
            )
        # Classes are numbered in the order in which people appear in the sample list, so that a
        # curriculum's first n classes are the first roots' people.
        self.people = list(rows)
        self._rows = [rows[person] for person in self.people]
        self._identities = identities
        self._images = images
        self._seed = seed

    @property
    def classes(self) -> int:
        """How many people there are."""
        return len(self.people)

    def batch(self, step: int, first_classes: int | None = None) -> Batch:
        """The batch of `step`, from the first `first_classes` people only if given."""
        count = min(first_classes or self.classes, self.classes)
        per_pass = count // self._identities
        order = np.random.default_rng((self._seed, 1, step // per_pass)).permutation(count)
        start = step % per_pass * self._identities
        chosen = order[start : start + self._identities]
        rng = np.random.default_rng((self._seed, 2, step))
        picked = [
            self._pick(self._rows[label][modality], rng)
            for modality in ("rgb", "ir")
            for label in chosen
        ]
        labels = np.tile(np.repeat(chosen, self._images), 2)
        is_ir = np.repeat([False, True], len(labels) // 2)
        return Batch(np.concatenate(picked), labels, is_ir)

    def _pick(self, rows: list[int], rng: np.random.Generator) -> np.ndarray:
        return rng.choice(rows, self._images, replace=len(rows) < self._images)
