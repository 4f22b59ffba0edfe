"""One search of a protocol: which images are queries, and the gallery of each trial."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from model import Modality
from training.datasets import DatasetError, Sample
from training.evaluation.metrics import IntArray, Protocol

TRIALS = 10
MIXED = "mixed"  # how the settings of galleries of both modalities begin
Convention = Literal["official", "seeded", "whole", "authors"]


@dataclass(frozen=True)
class Split:
    """One search: everything is given as indices into a list of samples.

    protocol: whose rules leave gallery images out and count CMC.
    setting: "all" or "indoor" on SYSU-MM01, else the direction, as in published tables.
    shots: "single" or "multi" on SYSU-MM01, else empty.
    convention: "official" where the archive's own trial file chose the galleries, "seeded"
        where Python's `random` did, "whole" where the gallery is every image, "authors" where
        the queries are drawn and the gallery is every image.
    queries: indices of the queries of all trials.
    galleries: indices of each trial's gallery.
    asked: which places of `queries` each trial asks; None: every trial asks all of them.
    """

    protocol: Protocol
    setting: str
    shots: str
    convention: Convention
    queries: IntArray
    galleries: list[IntArray]
    asked: list[IntArray] | None = None

    def rows(self, trial: int) -> IntArray:
        """Places in `queries` of those that a trial asks."""
        return np.arange(self.queries.size) if self.asked is None else self.asked[trial]

    @property
    def mixed(self) -> bool:
        """Whether galleries hold both modalities."""
        return self.setting.startswith(MIXED)

    @property
    def title(self) -> str:
        """In words: "all-search single-shot", "visible-to-infrared"."""
        return f"{self.setting}-search {self.shots}-shot" if self.shots else self.setting


def of_modality(samples: Sequence[Sample], modality: Modality) -> IntArray:
    """Indices of the images of a modality. Raises DatasetError where there are none."""
    found = [i for i, sample in enumerate(samples) if sample.modality == modality]
    if not found:
        word = "visible" if modality == "rgb" else "infrared"
        raise DatasetError(f"Expected {word} images of the chosen identities; there are none.")
    return np.array(found, dtype=np.int64)


def seeded_gallery(
    samples: Sequence[Sample], pool: IntArray, trial: int, shots: int = 1
) -> IntArray:
    """One gallery by the convention of most public code, which seeds `random` with the trial.

    Identities ascending, then cameras ascending; single-shot takes `random.choice` over the files
    sorted by name. The draws of an identity depend on the identities before it, so that only the
    same set gives the same galleries. Public code has no common convention for several shots: here
    it is `random.sample` without replacement, or all files where there are not more than `shots`.

    pool: indices to draw from, all of one modality.
    trial: 0-based.
    shots: images per identity and camera.
    """
    files: dict[tuple[int, int], list[int]] = {}
    for i in sorted(pool.tolist(), key=lambda i: samples[i].path.name):
        files.setdefault((samples[i].person_id, samples[i].camera), []).append(i)
    generator = random.Random(trial)
    chosen: list[int] = []
    for key in sorted(files):
        if shots == 1:
            chosen.append(generator.choice(files[key]))
        else:
            chosen.extend(generator.sample(files[key], min(shots, len(files[key]))))
    return np.array(chosen, dtype=np.int64)
