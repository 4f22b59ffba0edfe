"""Plain layout for anyone's own images: ``ROOT/rgb/<person>/…`` and ``ROOT/ir/<person>/…``.

Images may lie in further folders below a person's. There is no split and no camera: identity lists
say who is trained on and who is tested.
"""

import hashlib
import os
import unicodedata
from collections.abc import Collection
from pathlib import Path

from model import Modality
from model.image_files import find_images, is_other_programs
from model.labels import LabelError, normalized_label
from training.datasets.identity_lists import read_text
from training.datasets.layout import Layout
from training.datasets.sample import DatasetError, DatasetName, Sample

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
        names = self._names(root)
        samples: list[Sample] = []
        depth = len(root.parts)
        # In one walk: a linked folder that leads back to others must not give them a second name.
        for path in find_images([root / modality for modality, _ in _STREAMS]).images:
            folder, person, *file = path.parts[depth:]
            if file:
                modality, camera = next(stream for stream in _STREAMS if stream[0] == folder)
                samples.append(Sample(path, person_number(person), camera, modality))
        if not samples:
            raise DatasetError(f"Expected images such as {root}/rgb/1/1.jpg.", self.name)
        named = names | (ids if isinstance(ids, dict) else {})
        kept = self.require(samples, ids, lambda person: f"{root}/rgb/{named.get(person, person)}/")
        return sorted(kept, key=lambda s: (s.person_id, s.camera, s.path))

    def train_ids(self, root: Path, trial: int = 1) -> set[int]:
        return set(self._names(root))

    def test_ids(self, root: Path, trial: int = 1) -> set[int]:
        return self.train_ids(root)

    def read_ids(self, path: Path) -> dict[int, str]:
        """Names of people's folders, separated by commas or lines."""
        lines = read_text(path, self.name).replace(",", "\n").splitlines()
        people = [(name.strip(), person_number(name.strip())) for name in lines if name.strip()]
        if not people:
            raise DatasetError(f"Expected names of people's folders in {path}.", self.name)
        self.refuse_namesakes((_spelled(name), number) for name, number in people)
        return {number: name for name, number in people}

    def _names(self, root: Path) -> dict[int, str]:
        """Everyone who has a folder, whether or not it holds images: number → name.

        Raises DatasetError for a name that reads like another one.
        """
        people: list[tuple[str, int]] = []
        for folder in sorted(f for modality, _ in _STREAMS for f in _people(root / modality)):
            name = _spelled(folder.name)
            try:
                if not _is_bytes(name):
                    normalized_label(name)
            except LabelError as error:
                raise DatasetError(
                    f"Expected another name of a person than {folder.name!a} in {folder.parent}: "
                    f"{error}.",
                    self.name,
                ) from error
            people.append((name, person_number(name)))
        self.refuse_namesakes(people)
        return {number: name for name, number in people}


def _people(folder: Path) -> list[Path]:
    return [
        Path(entry.path)
        for entry in os.scandir(folder)
        if entry.is_dir() and not is_other_programs(entry.name)
    ]


def _is_bytes(name: str) -> bool:
    """Whether a name is no text in UTF-8; it is as good a name as any."""
    return any("\udc80" <= character <= "\udcff" for character in name)


def person_number(name: str) -> int:
    """A person's number: digits are themselves, other names a hash (48 bit, above 2⁵²).

    From the name alone, so that a person keeps the number when others come or go, and a checkpoint
    recognises whom it was trained on. The same for all spellings of a name in Unicode.
    """
    if name.isdecimal() and len(name) < 16:
        return int(name)
    spelled = _spelled(name).encode(errors="surrogateescape")
    return 2**52 + int.from_bytes(hashlib.sha256(spelled).digest()[:6])


def _spelled(name: str) -> str:
    return unicodedata.normalize("NFC", name)
