"""The messages between the service and its decoding processes.

A process says `READY` once it has started. For every image it is sent an `Order` as JSON and the
image's bytes. It answers with a JSON object (`FACTS` of the crop, or `code` and `detail` of an
error, and the seconds that it computed), the pixels and the bytes to store, none where they are
those that were sent: nothing that the service would have to unpickle, even from a process that an
image has taken over.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.pictures import Polarity
from service.images.decode import ModalityChoice

READY = b"ready"

FACTS = (
    "modality",
    "modality_source",
    "polarity",
    "width",
    "height",
    "bit_depth",
    "sha256",
    "media_type",
)


@dataclass(frozen=True)
class Order:
    """How to decode one image.

    height, width: of the picture to answer. seconds: how long it may compute. keep_metadata:
    whether the bytes to store keep EXIF and the like. sha256: of the image's bytes, so that it is
    not computed a second time.
    """

    modality: ModalityChoice
    polarity: Polarity
    box: tuple[int, int, int, int] | None
    limits: tuple[int, int, int, int, bool]
    height: int
    width: int
    seconds: float
    keep_metadata: bool
    sha256: str
