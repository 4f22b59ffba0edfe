"""RegDB layout: ``ROOT/{Visible,Thermal}/<id>/*`` and ``ROOT/idx/*_{1..10}.txt``.

Source: Nguyen et al., "Person Recognition System Based on a Combination of Body Images from
Visible Light and Thermal Cameras" (Sensors 2017); the ten random halves are those of Ye et al.
(AAAI 2018). One visible and one thermal camera stand side by side.
"""

from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

from model import Modality
from training.datasets.identity_lists import read_index
from training.datasets.layout import Layout
from training.datasets.sample import DatasetName, Sample

# (word in the index file's name, modality, camera number as public evaluation code has it)
_STREAMS: tuple[tuple[str, Modality, int], ...] = (("visible", "rgb", 1), ("thermal", "ir", 2))


class RegDB(Layout):
    """Ten trials: half of the people are trained on, the others tested, a model for each trial.

    A person is the number of the folder, not the index's label: labels start at 0 on both sides.
    """

    name = DatasetName.REGDB
    title = "RegDB"
    folders = ("idx", "Visible", "Thermal")
    trials = 10
    published: ClassVar[dict[str, int]] = {
        "identities": 412,
        "images": 8240,
        "training identities": 206,
        "training visible images": 2060,
        "training infrared images": 2060,
        "test identities": 206,
        "test visible images": 2060,
        "test infrared images": 2060,
    }

    def images(
        self, root: Path, trial: int = 1, ids: Collection[int] | None = None
    ) -> list[Sample]:
        samples = [
            Sample(path, person, camera, modality)
            for side in ("train", "test")
            for word, modality, camera in _STREAMS
            for path, person in read_index(root, _index(root, side, word, trial), self.name)
        ]
        self.refuse_namesakes((sample.path.parent.name, sample.person_id) for sample in samples)
        kept = self.require(samples, ids, lambda person: f"{root}/Visible/{person}/")
        return sorted(kept, key=lambda s: (s.person_id, s.camera, s.path.name))

    def train_ids(self, root: Path, trial: int = 1) -> set[int]:
        return self._people(root, "train", trial)

    def test_ids(self, root: Path, trial: int = 1) -> set[int]:
        return self._people(root, "test", trial)

    def _people(self, root: Path, side: str, trial: int) -> set[int]:
        return {
            person
            for word, _, _ in _STREAMS
            for _, person in read_index(root, _index(root, side, word, trial), self.name)
        }


def _index(root: Path, side: str, word: str, trial: int) -> Path:
    return root / "idx" / f"{side}_{word}_{trial}.txt"
