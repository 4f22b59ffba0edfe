"""How a picture is read: as its sender says, else as its camera's defaults do."""

from __future__ import annotations

from model.pictures import Polarity
from service.gallery import Camera
from service.images.decode import Box, ModalityChoice, Picture


def picture_of(
    data: bytes,
    box: Box | None,
    modality: ModalityChoice | None,
    polarity: Polarity | None,
    camera: Camera | None,
) -> Picture:
    """The picture to decode. modality, polarity: the sender's, None where it gave none.

    camera: None where the sender named none, or one of which nothing is known.
    """
    known = camera or Camera("")
    return Picture(
        data,
        modality or known.modality or "auto",
        box,
        polarity or known.polarity or "white_hot",
        by_camera=modality is None and known.modality is not None,
    )
