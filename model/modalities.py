"""The kinds of images, and what may be said of one. Loads nothing, as commands must not."""

from __future__ import annotations

from typing import Literal

Modality = Literal["rgb", "ir"]
MODALITIES: tuple[Modality, Modality] = ("rgb", "ir")
ModalityChoice = Literal["auto", "rgb", "ir"]
Polarity = Literal["white_hot", "black_hot"]


def embedding_name(modality: Modality) -> str:
    """The name of the graph that embeds images of `modality`."""
    return f"embedding-{modality}"
