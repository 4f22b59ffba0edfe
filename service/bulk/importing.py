"""Files of features → items of a gallery, checked row by row and added as enrollments are.

Each crop is decoded again, as the service decodes an upload: nothing is stored that could not be
shown, or embedded again later. Where the gallery's cameras have it read otherwise than it was (as
infrared, or inverted), it is embedded again here, so that the outcome is that of `cmt enroll`.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch.nn.functional import cosine_similarity

from model import load_checkpoint
from model.config import MODALITIES, CMTConfig
from model.device import chosen_device
from model.int8 import LEAST_COSINE
from model.strict_json import read_json
from service.api.schemas import BatchItem
from service.bulk.embedding import decoders_of
from service.bulk.features import BulkError, DamagedRow, FeatureFile, Row
from service.client.bulk import what_is_wrong
from service.embedding.embedder import Embedder
from service.errors import (
    EmbeddingFailed,
    GalleryLocked,
    IdempotencyConflict,
    ImageBlank,
    RuntimeUnavailable,
    ServiceError,
)
from service.gallery import Act, Camera, NewItem, RequestKey
from service.gallery.filling import filling
from service.gallery.index.room import capacity, feature_bytes
from service.gallery.storage.store import Store
from service.images.decode import Crop, ImageLimits, ModalitySource, Picture
from service.images.pool import Decoders
from service.images.turns import Share
from service.kit.text import counted
from service.pipeline.reading import picture_of
from service.settings import Settings

log = logging.getLogger(__name__)

# A runtime is used where its features have at least a cosine of LEAST_COSINE to those of fp32 (that
# is int8's, bf16's is more), so those of two runtimes have at least the cosine of twice that angle.
# Another picture's features, or those of another checkpoint, are far below that.
SAME = 2 * LEAST_COSINE**2 - 1
_UNIT = 0.01  # how far a length may be from 1, after bf16 and fp16
_TRIES = 8  # until an item that others enroll and delete at the same moment is given up
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DEPTHS = range(1, 65)  # bits of a sample

DAMAGED, LABELS, FEATURES = "row_damaged", "labels_invalid", "features_invalid"
"""Codes of rows that are refused; all others are those of the service."""


@dataclass(frozen=True)
class Refusal:
    """A row that was not imported. labels: as the row has them."""

    path: str
    code: str
    reason: str
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Tally:
    """What became of the rows so far. before: of `imported`, those that were there already."""

    imported: int = 0
    before: int = 0
    embedded_again: int = 0
    refused: list[Refusal] = field(default_factory=list)


class _Checked(NamedTuple):
    """A row that is sound, and its labels; path: of the picture, from the root on."""

    row: Row
    item: BatchItem
    path: str


class _Begun(NamedTuple):
    """A checked row whose crop is being decoded."""

    checked: _Checked
    picture: Picture
    source: ModalitySource
    crop: Future[Crop]


class _Ready(NamedTuple):
    """What is to be added."""

    checked: _Checked
    item: NewItem
    features: npt.NDArray[np.float16]


@contextmanager
def importing(
    settings: Settings, files: Sequence[FeatureFile], *, served_elsewhere: bool = False
) -> Iterator[Importer]:
    """An importer of these files into the gallery that the settings name.

    served_elsewhere: by machines with other memory, so that this one's does not matter. Raises
    BulkError where they are of another checkpoint than the settings', or where this machine could
    not serve the gallery then; CheckpointError; and a ServiceError where the gallery is in use, of
    another checkpoint or cannot be opened.
    """
    info = load_checkpoint(settings.checkpoint, "cpu")[1]
    for file in files:
        if file.header.fingerprint != info.fingerprint:
            raise BulkError(
                f"{file.path} has features of the checkpoint {file.header.fingerprint[:12]}, and "
                f"{settings.checkpoint} is {info.fingerprint[:12]}; give the one that made them, "
                "which must also be the gallery's"
            )
        if file.header.config != info.config:
            raise BulkError(f"{file.path} says another configuration than its checkpoint's")
    gallery = filling(
        settings.data_dir,
        info,
        database_url=settings.database_url,
        clock_confirmed=settings.clock_confirmed,
        crops_url=settings.crops_url,
        crops_inline_bytes=settings.crops_inline_bytes,
    )
    with _opened(gallery) as store, closing(decoders_of(settings)) as decoders:
        if not served_elsewhere:
            _check_room(store, files, info.config, chosen_device(settings.device))
        embedder = Embedder(
            settings.checkpoint,
            device=settings.device,
            runtime=settings.runtime,
            cache_dir=settings.data_dir / "cache",
        )
        with closing(embedder):
            limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
            yield Importer(store, embedder, decoders, limits)


class Importer:
    """Adds rows to `store`. Its methods are called by one thread, in order.

    embedder: of the checkpoint that made the features. decoders: with the `limits` of the service.
    """

    def __init__(
        self, store: Store, embedder: Embedder, decoders: Decoders, limits: ImageLimits
    ) -> None:
        self._store, self._embedder, self._decoders = store, embedder, decoders
        # A box is stored as PNG, which may be larger than the frame that it was sent with.
        self._of_box = limits._replace(max_bytes=max(limits.max_bytes, 4 * limits.max_pixels))
        self._config = embedder.info.config
        self._share = Share("")
        self.tally = Tally()

    def verify(self, files: Sequence[FeatureFile], count: int) -> float | None:
        """Embed so many random crops again and compare → the lowest cosine; None without one.

        Raises BulkError where one is less than `SAME`. Rows that `add` refuses are passed over.
        """
        total = sum(file.count for file in files)
        chosen = set(random.sample(range(total), min(count, total)))
        rows: list[Row] = []
        crops: list[Crop] = []
        number = 0
        for file, at, size in _groups(files):
            wanted = [place for place in range(size) if number + place in chosen]
            number += size
            if not wanted:
                continue
            group = file.read_group(at)
            for place in wanted:
                checked = self._checked(file, group[place])
                if isinstance(checked, Refusal):
                    continue
                row = checked.row
                picture = Picture(row.crop, row.modality, polarity=row.polarity or "white_hot")
                begun = _Begun(checked, picture, "given", self._begin(picture, row))
                try:
                    crops.append(self._decoded(begun))
                except ServiceError:
                    continue
                rows.append(row)
        if not rows:
            return None
        again = self._embedder.embed(crops).flatten(1)
        given = torch.from_numpy(np.stack([row.features for row in rows]).astype(np.float32))
        cosines = cosine_similarity(again, given)
        worst = int(cosines.argmin())
        if not cosines[worst] >= SAME:
            raise BulkError(
                f"the features of {rows[worst].path} are not those that the checkpoint computes "
                f"here (cosine {cosines[worst]:.3f}, at least {SAME:.3f} is wanted); nothing was "
                "imported, embed the pictures again"
            )
        return float(cosines[worst])

    def add(
        self,
        files: Sequence[FeatureFile],
        *,
        actor: str,
        advance: Callable[[int], None] = lambda count: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Add the rows that the gallery does not have, and count in `tally`.

        advance: called with how many rows are done; those are durable. stopping: whether to end
        soon. Raises a ServiceError where nothing more can be stored; the same call goes on later.
        """
        rows = sum(file.count for file in files)
        self._store.audit.append(Act(actor, "import", details={"rows": rows}))
        before: tuple[list[_Begun], int] | None = None
        for file, at, size in _groups(files):
            if stopping():
                break
            begun = self._begun(file, at)  # decoded while those before are stored
            if before is not None:
                self._finish(before[0])
                advance(before[1])
            before = begun, size
        if before is not None:
            self._finish(before[0])
            advance(before[1])

    def _begun(self, file: FeatureFile, at: int) -> list[_Begun]:
        """Let the crops of a row group be decoded, without those that the gallery has already."""
        rows: list[_Checked] = []
        for read in file.read_group(at):
            checked = self._checked(file, read)
            if isinstance(checked, Refusal):
                self.tally.refused.append(checked)
            else:
                rows.append(checked)
        if rows and self._enrolled(rows[0]):  # likely all: an import that is repeated
            rows = [one for one in rows if not self._is_known(one)]
        ids = {one.item.camera_id for one in rows if one.item.camera_id is not None}
        cameras: Mapping[str, Camera] = self._store.cameras.find(ids) if ids else {}
        begun = []
        for one in rows:
            camera = cameras.get(one.item.camera_id or "")
            given = one.item.modality, one.item.polarity
            picture = picture_of(one.row.crop, None, *given, camera)
            source: ModalitySource = "camera" if picture.by_camera else "given"
            if picture.modality == "auto":  # it was detected in the picture as that was sent
                picture, source = replace(picture, modality=one.row.modality), "detected"
            begun.append(_Begun(one, picture, source, self._begin(picture, one.row)))
        return begun

    def _begin(self, picture: Picture, row: Row, *, judged: bool = True) -> Future[Crop]:
        size = self._config.input_height, self._config.input_width
        limits = None if row.box is None else self._of_box._replace(judged=judged)
        return self._decoders.submit(picture, *size, self._share, limits)

    def _decoded(self, begun: _Begun) -> Crop:
        """The crop as the gallery stores it. Raises ServiceError."""
        row, picture = begun.checked.row, begun.picture
        try:
            crop = begun.crop.result()
        except ImageBlank:
            if row.box is None:
                raise
            crop = self._begin(picture, row, judged=False).result()  # the frame was judged, not it
        return replace(
            crop, sha256=row.sha256, bit_depth=row.bit_depth, modality_source=begun.source
        )

    def _finish(self, begun: Sequence[_Begun]) -> None:
        """Add rows whose crops are decoded."""
        decoded: list[tuple[_Checked, Crop]] = []
        for each in begun:
            try:
                decoded.append((each.checked, self._decoded(each)))
            except RuntimeUnavailable:
                raise
            except ServiceError as error:
                self._refuse(each.checked, error.code, error.detail)
        other = [at for at, (one, crop) in enumerate(decoded) if _read_otherwise(one.row, crop)]
        rows = [one.row.features for one, _ in decoded]
        if other:
            again = self._embedder.embed([decoded[at][1] for at in other]).flatten(1).half()
            for at, row in zip(other, again.numpy(), strict=True):
                rows[at] = row
        ready: list[_Ready] = []
        for (one, crop), row in zip(decoded, rows, strict=True):
            if np.isfinite(row).all():
                ready.append(_Ready(one, _item(one, crop), row))
            else:
                self._refuse(one, EmbeddingFailed.code, "its features are not finite")
        self.tally.embedded_again += len(other)
        self._add(self._first_of_each(ready))

    def _add(self, ready: list[_Ready]) -> None:
        for attempt in range(_TRIES):
            if not ready:
                return
            try:
                self._store.add(
                    [one.item for one in ready], np.stack([one.features for one in ready])
                )
            except IdempotencyConflict:
                if attempt == _TRIES - 1:
                    raise
                ready = [one for one in ready if not self._is_known(one.checked)]
            else:
                self.tally.imported += len(ready)
                return

    def _first_of_each(self, ready: Sequence[_Ready]) -> list[_Ready]:
        """Without those whose key an earlier one of the same group has."""
        first: dict[str, _Ready] = {}
        for one in ready:
            row = one.checked.row
            before = first.setdefault(row.key, one)
            if before is one:
                continue
            if before.checked.row.request_sha256 == row.request_sha256:
                self._count_known()
            else:
                detail = "this key stands for other content in the same file; embed again"
                self._refuse(one.checked, IdempotencyConflict.code, detail)
        return list(first.values())

    def _is_known(self, one: _Checked) -> bool:
        """Whether the gallery has a row already, or another one under its key; it is counted."""
        try:
            if not self._enrolled(one, conflicting=True):
                return False
        except IdempotencyConflict as conflict:
            self._refuse(one, conflict.code, conflict.detail)
        else:
            self._count_known()
        return True

    def _enrolled(self, one: _Checked, *, conflicting: bool = False) -> bool:
        """Whether the gallery has an item with this key. Raises IdempotencyConflict if asked to."""
        try:
            found = self._store.enrolled_by(RequestKey(one.row.key, one.row.request_sha256))
        except IdempotencyConflict:
            if conflicting:
                raise
            return True
        return found is not None

    def _count_known(self) -> None:
        self.tally.imported += 1
        self.tally.before += 1

    def _checked(self, file: FeatureFile, row: Row | DamagedRow) -> _Checked | Refusal:
        """The row with its labels, or why it is refused before its crop is looked at."""
        root = file.header.root
        path = f"{root.rstrip('/')}/{row.path}" if not row.path.startswith("/") else row.path
        if isinstance(row, DamagedRow):
            return Refusal(path, DAMAGED, row.reason)
        written = {
            "person_id": row.person_id,
            "camera_id": row.camera_id,
            "captured_at": row.captured_at,
            "modality": row.given_modality,
            "polarity": row.given_polarity,
            "metadata": row.metadata,
        }
        try:
            labels = {**written, "metadata": read_json(row.metadata), "key": row.key}
            item = BatchItem.model_validate(labels)
        except ValidationError as error:
            return Refusal(path, LABELS, "; ".join(what_is_wrong(error)), written)
        except ValueError as error:
            return Refusal(path, LABELS, f"metadata: {error}", written)
        labels.pop("key")
        if not all(map(_SHA256.fullmatch, (row.sha256, row.request_sha256))):
            return Refusal(path, DAMAGED, "its SHA-256 is none; embed it again", labels)
        if row.modality not in MODALITIES or row.bit_depth not in _DEPTHS:
            return Refusal(path, DAMAGED, "it says what no picture is; embed it again", labels)
        length = np.linalg.norm(row.features.astype(np.float64))
        if not np.isfinite(length):
            return Refusal(path, FEATURES, "its features are not finite; embed it again", labels)
        if self._config.normalise_test and abs(length - 1) > _UNIT:
            reason = f"its features have the length {length:.3f}, not 1; embed it again"
            return Refusal(path, FEATURES, reason, labels)
        return _Checked(row, item, path)

    def _refuse(self, one: _Checked, code: str, reason: str) -> None:
        labels = one.item.model_dump(exclude_unset=True, exclude={"key"})
        self.tally.refused.append(Refusal(one.path, code, reason, labels))


@contextmanager
def _opened(gallery: AbstractContextManager[Store]) -> Iterator[Store]:
    """Open it; where a service has it, say what else there is. Raises as `filling`."""
    with ExitStack() as stack:
        try:
            store = stack.enter_context(gallery)
        except GalleryLocked as error:
            raise BulkError(
                f"{error.detail.partition(';')[0]}; stop that one, or enroll at it with `cmt "
                "enroll` (a gallery in PostgreSQL may be in use: --database-url)"
            ) from error
        yield store


def _check_room(store: Store, files: Sequence[FeatureFile], config: CMTConfig, device: str) -> None:
    """Compare what the gallery will be with the memory that is free.

    A gallery of this machine is refused then: BulkError. One in PostgreSQL is served by others,
    which may have more: a warning.
    """
    width = (config.parts + 1) * config.dim
    found = capacity(width, device)
    most = found.on_host + (found.on_device or 0)
    there = store.count() if store.database.sqlite else 0  # a service that runs holds its own
    new = sum(file.count for file in files)
    if there + new > most:
        new -= _known(store, files)
    if there + new <= most:
        return
    needed = feature_bytes(there + new, width) / 1e9
    if not store.database.sqlite:
        log.warning(
            "each service of this gallery needs memory for %s, %.1f GB at least, and what is free "
            "on this machine holds %s; ask `cmt doctor` on theirs, or divide the gallery into "
            "shards (docs/scale.md)",
            counted(new, "more item"), needed, f"{most:,}",
        )  # fmt: skip
        return
    raise BulkError(
        f"the gallery would have {there + new:,} items, which need {needed:.1f} GB of memory at "
        f"least, and what is free here holds {most:,}; free or add memory, import fewer files, or "
        "say --served-elsewhere where another machine serves it (docs/scale.md)"
    )


def _known(store: Store, files: Sequence[FeatureFile]) -> int:
    """About how many rows the gallery has already, by the first of each row group."""
    known = 0
    for file, at, size in _groups(files):
        try:
            if store.enrolled_by(RequestKey(*file.first_request(at))) is not None:
                known += size
        except IdempotencyConflict:  # told when the row is added
            continue
    return known


def _groups(files: Sequence[FeatureFile]) -> Iterator[tuple[FeatureFile, int, int]]:
    """All row groups: file, number and size."""
    for file in files:
        for at, size in enumerate(file.groups()):
            yield file, at, size


def _read_otherwise(row: Row, crop: Crop) -> bool:
    return (crop.modality, crop.polarity) != (row.modality, row.polarity)


def _item(one: _Checked, crop: Crop) -> NewItem:
    return NewItem(
        crop,
        person_id=one.item.person_id,
        camera_id=one.item.camera_id,
        captured_at=one.item.captured_at,
        metadata=one.item.metadata,
        request=RequestKey(one.row.key, one.row.request_sha256),
    )
