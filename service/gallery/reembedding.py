"""From one checkpoint's features to another's, in the background, while the first one is searched.

    stored crops → embed → features of the new version, next to the old ones, until none is missing
    a sample embedded a second time → counts → activate, in one transaction

Finished work is in the store: after a crash it continues from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from model import CheckpointInfo
from model.pixels import resize
from service.errors import GalleryDamaged, ServiceError
from service.gallery.records import StoredCrop
from service.gallery.storage.replicas import Replicas
from service.gallery.storage.store import Store
from service.images.decode import STORED_LIMITS, Crop, Picture, decode

Embed = Callable[[Sequence[Crop]], Tensor]  # B crops → B×P×D, as `Embedder.embed`
# A stored crop → its picture at the height and width of the network's input.
Decode = Callable[[Picture, int, int], Crop]

_BLOCK = 64
_SAMPLE = 32  # items whose features are computed a second time before the switch
# fp16 and another batch round differently; a wrong row or a wrong checkpoint differs far more.
_SAME = 0.99


class ReembeddingStopped(Exception):  # noqa: N818
    """Re-embedding was asked to stop; the next run continues from there."""


def decode_here(picture: Picture, height: int, width: int) -> Crop:
    """Decode a stored crop in this process. Raises ServiceError."""
    crop = decode(
        picture.data, modality=picture.modality, polarity=picture.polarity, limits=STORED_LIMITS
    )
    return replace(crop, image=resize(crop.image, height, width))


@dataclass(frozen=True)
class Progress:
    """done of total items have features of the new version."""

    done: int
    total: int


@contextmanager
def known_to_all(
    replicas: Replicas | None, fingerprint: str, actor: str, progress: Callable[[Progress], None]
) -> Iterator[tuple[Callable[[Progress], None], Callable[[], bool]]]:
    """A run that the other replicas know of → its `progress`, and whether it has been taken over.

    Only one runs at a time. Where it is stopped, or its replica dies, another one goes on with it.
    Raises ModelVersionConflict while another replica has one.
    """
    if replicas is None:
        yield progress, lambda: False
        return
    details = {"state": "running", "checkpoint": fingerprint, "actor": actor, "done": 0, "total": 0}
    mine = True
    replicas.begin_run(details)

    def tell(now: Progress) -> None:
        nonlocal mine
        details.update(done=now.done, total=now.total)
        mine = replicas.note_run(details)
        progress(now)

    try:
        yield tell, lambda: not mine
        details["state"] = "done"
    except ReembeddingStopped:
        raise
    except Exception as error:
        detail = error.detail if isinstance(error, ServiceError) else "a defect"
        details.update(state="failed", detail=detail)
        raise
    finally:
        if mine:
            with suppress(ServiceError):  # then the others find that this one has ended
                replicas.note_run(details, ended=True)


class Reembedding:
    """Embeds a gallery with another checkpoint. Its methods are called by one thread, in order.

    store: as seen with the new version. embed: the new checkpoint's.
    """

    def __init__(
        self,
        store: Store,
        info: CheckpointInfo,
        embed: Embed,
        decode: Decode,
        *,
        stopping: Callable[[], bool],
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._store, self._info = store, info
        self._embed, self._decode = embed, decode
        self._progress = progress or (lambda _: None)
        self._stopping = stopping

    def fill(self) -> None:
        """Embed every item without features, also those enrolled meanwhile, but for the last few.

        Raises ReembeddingStopped, and GalleryDamaged for a crop that cannot be embedded.
        """
        versions, fingerprint = self._store.versions, self._info.fingerprint
        total = self._store.count()
        done = total - versions.count_missing(fingerprint)
        self._progress(Progress(done, total))
        for block in versions.missing(fingerprint, _BLOCK):
            if self._stopping():
                raise ReembeddingStopped
            numbers, rows = [crop.number for crop in block], self.embedded(block)
            done += versions.add_features(fingerprint, numbers, rows)
            total = max(total, done)
            self._progress(Progress(done, total))

    def verify(self) -> None:
        """Compute the features of a few items again, and compare. Raises GalleryDamaged."""
        crops, kept = self._store.versions.sample(self._info.fingerprint, _SAMPLE)
        if not crops:
            return
        again = self.embedded(crops).astype(np.float32)
        norms = np.linalg.norm(again, axis=1) * np.linalg.norm(kept, axis=1)
        cosines = (again * kept).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny)
        worst = int(cosines.argmin())
        if cosines[worst] < _SAME:
            raise GalleryDamaged(
                f"item number {crops[worst].number} was embedded a second time with another result "
                f"(cosine {cosines[worst]:.3f}); the old version stays in use, check memory and "
                "disk and start again"
            )

    def embedded(self, crops: Sequence[StoredCrop]) -> npt.NDArray[np.float16]:
        """Decode and embed stored crops → N×(P·D). Raises GalleryDamaged."""
        size = self._info.config.input_height, self._info.config.input_width
        pictures = []
        for crop in crops:
            try:
                polarity = crop.polarity or "white_hot"
                picture = Picture(crop.data, crop.modality, polarity=polarity)
                pictures.append(self._decode(picture, *size))
            except ServiceError as error:
                raise GalleryDamaged(
                    f"the stored crop of item number {crop.number} cannot be read "
                    f"({error.detail}); delete the item, or restore a backup"
                ) from error
        rows: npt.NDArray[np.float16] = (
            self._embed(pictures).detach().flatten(1).half().cpu().numpy()
        )
        return rows
