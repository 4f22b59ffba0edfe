"""What every dataset reader returns."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from model import Modality


class DatasetName(StrEnum):
    """Layouts that can be trained on and evaluated."""

    SYSU = "sysu"
    REGDB = "regdb"
    LLCM = "llcm"
    FOLDER = "folder"


class DatasetError(ValueError):
    """A dataset folder is not as its protocol says; the message names what was expected.

    With `dataset`, it also names the place in the documentation that describes that layout.
    """

    def __init__(self, message: str, dataset: DatasetName | None = None) -> None:
        if dataset is not None:
            message = f"{message.rstrip('.')}; see docs/training.md#{dataset.value}."
        super().__init__(message)


@dataclass(frozen=True)
class Sample:
    """One person crop on disk, with what its protocol needs to know about it."""

    path: Path
    person_id: int
    camera: int
    modality: Modality
