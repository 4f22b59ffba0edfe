"""The two kinds of images. Loads nothing, for the processes that decode."""

from __future__ import annotations

from typing import Literal

Modality = Literal["rgb", "ir"]
MODALITIES: tuple[Modality, Modality] = ("rgb", "ir")
