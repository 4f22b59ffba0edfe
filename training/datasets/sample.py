"""What every dataset reader returns."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

Modality = Literal["rgb", "ir"]


class DatasetName(StrEnum):
    """Layouts that can be trained on and evaluated."""

    SYSU = "sysu"


class DatasetError(ValueError):
    """A dataset folder is not as its protocol says; the message names what was expected."""


@dataclass(frozen=True)
class Sample:
    """One person crop on disk, with what its protocol needs to know about it."""

    path: Path
    person_id: int
    camera: int
    modality: Modality
