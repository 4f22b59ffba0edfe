"""The kinds of images, and what may be said of one. Loads nothing, as commands must not."""

from __future__ import annotations

from typing import Literal

Modality = Literal["rgb", "ir"]
MODALITIES: tuple[Modality, Modality] = ("rgb", "ir")
ModalityChoice = Literal["auto", "rgb", "ir"]
Polarity = Literal["white_hot", "black_hot"]
