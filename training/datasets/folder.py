"""Plain layout for anyone's own images: ``ROOT/rgb/<person>/…`` and ``ROOT/ir/<person>/…``.

Images may lie in further folders below a person's. There is no split and no camera: identity lists
say who is trained on and who is tested.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path

from model import Modality
from training.datasets.identity_lists import read_text
from training.datasets.layout import Layout
from training.datasets.sample import DatasetError, DatasetName, Sample, is_image

# As in RegDB: one camera for each kind of light.
_STREAMS: tuple[tuple[Modality, int], ...] = (("rgb", 1), ("ir", 2))


class Folder(Layout):
    """Trained and tested on everyone unless identity lists say otherwise."""

    name = DatasetName.FOLDER
    title = "folder"
    folders = tuple(modality for modality, _ in _STREAMS)

    def images(
        self, root: Path, trial: int = 1, ids: Collection[int] | None = None
    ) -> list[Sample]:
        samples: list[Sample] = []
        for modality, camera in _STREAMS:
            for person in _people(root / modality):
                samples.extend(
                    Sample(path, person_number(person.name), camera, modality)
                    for path in sorted(person.rglob("*"))
                    if is_image(path)
                )
        if not samples:
            raise DatasetError(f"Expected images such as {root}/rgb/1/1.jpg.", self.name)
        missing = set(ids or ()) - {sample.person_id for sample in samples}
        names = {person_number(name): name for name in _names(root)}
        name = names.get(min(missing), "<name of number {id}>") if missing else ""
        kept = self.require(samples, ids, f"{root}/rgb/{name}/")
        return sorted(kept, key=lambda s: (s.person_id, s.camera, s.path))

    def train_ids(self, root: Path, trial: int = 1) -> set[int]:
        return {person_number(name) for name in _names(root)}

    def test_ids(self, root: Path, trial: int = 1) -> set[int]:
        return self.train_ids(root)

    def read_ids(self, path: Path) -> list[int]:
        """Names of people's folders, separated by commas or lines → their numbers."""
        names = [
            name.strip() for name in read_text(path, self.name).replace(",", "\n").splitlines()
        ]
        numbers = sorted({person_number(name) for name in names if name})
        if not numbers:
            raise DatasetError(f"Expected names of people's folders in {path}.", self.name)
        return numbers


def _people(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _names(root: Path) -> set[str]:
    """Everyone who has a folder, whether or not it holds images."""
    return {person.name for modality, _ in _STREAMS for person in _people(root / modality)}


def person_number(name: str) -> int:
    """A person's number: digits are themselves, other names a hash (48 bit, above 2⁵²).

    From the name alone, so that a person keeps the number when others come or go, and a checkpoint
    recognises whom it was trained on.
    """
    if name.isdecimal() and len(name) < 16:
        return int(name)
    return 2**52 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
