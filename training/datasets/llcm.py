"""LLCM layout: training images by index files, test images by camera and person.

``ROOT/idx/train_{vis,nir}.txt``, ``ROOT/idx/test_id.txt`` (comma-separated) and
``ROOT/test_{vis,nir}/cam{1..9}/<id:04d>/*``. Source: Zhang and Wang, "Diverse Embedding Expansion
Network and Low-Light Cross-Modality Benchmark for Visible-Infrared Person Re-identification"
(CVPR 2023). Nine cameras see both kinds of light, but camera 3 has no infrared test images.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

from model import Modality
from model.image_files import find_images
from training.datasets.identity_lists import read_ids, read_index
from training.datasets.layout import Layout
from training.datasets.sample import DatasetError, DatasetName, Sample

_STREAMS: tuple[tuple[str, Modality], ...] = (("vis", "rgb"), ("nir", "ir"))
_CAMERAS = range(1, 10)


class LLCM(Layout):
    """Trained on the people of idx/train_*.txt, tested on those of idx/test_id.txt."""

    name = DatasetName.LLCM
    title = "LLCM"
    folders = ("idx", "test_vis", "test_nir")
    published: ClassVar[dict[str, int]] = {
        "identities": 1064,
        "images": 46767,
        "training identities": 713,
        "test identities": 351,
    }

    def images(
        self, root: Path, trial: int = 1, ids: Collection[int] | None = None
    ) -> list[Sample]:
        samples = [*self._training_images(root), *self._test_images(root)]
        self.refuse_namesakes((sample.path.parent.name, sample.person_id) for sample in samples)
        kept = self.require(samples, ids, lambda person: f"{root}/test_vis/cam*/{person:04d}/")
        return sorted(kept, key=lambda s: (s.person_id, s.modality, s.camera, s.path.name))

    def train_ids(self, root: Path, trial: int = 1) -> set[int]:
        return {sample.person_id for sample in self._training_images(root)}

    def test_ids(self, root: Path, trial: int = 1) -> set[int]:
        return set(read_ids(root / "idx" / "test_id.txt", self.name, lowest=0))

    def _training_images(self, root: Path) -> list[Sample]:
        return [
            Sample(path, person, _camera_in_name(path), modality)
            for word, modality in _STREAMS
            for path, person in read_index(root, root / "idx" / f"train_{word}.txt", self.name)
        ]

    def _test_images(self, root: Path) -> list[Sample]:
        samples: list[Sample] = []
        wanted = self.test_ids(root)
        for word, modality in _STREAMS:
            folder = root / f"test_{word}"
            cameras = [camera for camera in _CAMERAS if (folder / f"cam{camera}").is_dir()]
            if not cameras:
                raise DatasetError(f"Expected the camera folder {folder}/cam1.", self.name)
            for camera in cameras:
                for person in (folder / f"cam{camera}").iterdir():
                    if person.name.isdecimal() and int(person.name) in wanted:
                        samples.extend(
                            Sample(path, int(person.name), camera, modality)
                            for path in find_images(person, below=False).images
                        )
        return samples


def _camera_in_name(path: Path) -> int:
    """Training images carry their camera in the name (0001_c05_s185535_f7010_nir.jpg); else 0."""
    found = re.search(r"_c(\d+)_", path.name)
    return int(found[1]) if found else 0
