"""Image bytes → the picture that the network is given: one reader for service and training."""

from model.modalities import ModalityChoice, Polarity
from model.pictures.errors import Kind, PictureError
from model.pictures.reader import (
    POLICY,
    Box,
    Format,
    ImageLimits,
    Reading,
    read,
)

__all__ = [
    "POLICY",
    "Box",
    "Format",
    "ImageLimits",
    "Kind",
    "ModalityChoice",
    "PictureError",
    "Polarity",
    "Reading",
    "read",
]
