"""Enroll crops: one, or many in one transaction, each with an outcome of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

import torch

from model.pictures import Polarity
from service.errors import IdempotencyConflict, ServiceError
from service.gallery import Camera, Item, NewItem, RequestKey
from service.images.decode import Box, ModalityChoice, Picture
from service.kit.concurrency import gathered
from service.pipeline.conflicts import retried
from service.pipeline.pipeline import Embedding, Pipeline
from service.pipeline.reading import picture_of

# For each stream of the device, batches of the network that one caller's images may make up while
# they are decoded or wait for it.
_WINDOW = 4
_AHEAD = 4  # images of a request, the first ones, that wait for no earlier request


@dataclass(frozen=True)
class Labels:
    """A crop's labels, as its sender gives them."""

    person_id: str | None = None
    camera_id: str | None = None
    captured_at: datetime | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Enrollment:
    """One crop to enroll. modality, polarity: None where the sender gave none.

    key: the client's Idempotency-Key.
    """

    data: bytes
    box: Box | None = None
    modality: ModalityChoice | None = None
    polarity: Polarity | None = None
    labels: Labels = field(default_factory=Labels)
    key: str | None = None

    def picture(self, cameras: Mapping[str, Camera]) -> Picture:
        """The picture to decode. cameras: what is known of them, by id."""
        camera = cameras.get(self.labels.camera_id or "")
        return picture_of(self.data, self.box, self.modality, self.polarity, camera)

    def request(self, picture: Picture) -> RequestKey | None:
        """The key with the SHA-256 of all that is enrolled under it, as its sender gave it."""
        if self.key is None:
            return None
        digest = hashlib.sha256(bytes.fromhex(picture.sha256))
        labels = self.labels
        captured = None if labels.captured_at is None else labels.captured_at.isoformat()
        content = [
            *(self.modality or "auto", self.box, labels.person_id, labels.camera_id),
            *(captured, labels.metadata),
        ]
        if self.polarity is not None:  # which earlier releases did not know: their keys still hold
            content.append(self.polarity)
        digest.update(json.dumps(content, sort_keys=True).encode())
        return RequestKey(self.key, digest.hexdigest())

    def item(self, embedding: Embedding, request: RequestKey | None) -> NewItem:
        """The item to add to the gallery."""
        return NewItem(
            embedding.crop,
            person_id=self.labels.person_id,
            camera_id=self.labels.camera_id,
            captured_at=self.labels.captured_at,
            metadata=self.labels.metadata,
            request=request,
        )


@dataclass(frozen=True)
class Enrolled:
    """An enrolled item. new: False where the same key and content had enrolled it before."""

    item: Item
    new: bool


Outcome = Enrolled | ServiceError


async def enroll(pipeline: Pipeline, wanted: Sequence[Enrollment], actor: str) -> list[Outcome]:
    """Decode and embed crops, and store those that can be in one transaction.

    An image that is refused, and a key that stands for other content, fail alone. Raises the error
    of the transaction (StorageFull, GalleryFull, StorageUnwritable, DatabaseUnavailable,
    CropsUnavailable, ModelVersionConflict); nothing is stored then.
    """
    return await _Batch(pipeline, wanted, actor).run()


class _Batch:
    def __init__(self, pipeline: Pipeline, wanted: Sequence[Enrollment], actor: str) -> None:
        self._pipeline, self._wanted = pipeline, wanted
        self._share = pipeline.share(actor)
        self._pictures: list[Picture] = []
        self._requests: list[RequestKey | None] = [None] * len(wanted)
        self._outcomes: dict[int, Outcome] = {}
        self._same: dict[int, int] = {}  # place → an earlier one with the same key and content
        self._embedded: dict[int, Embedding] = {}

    async def run(self) -> list[Outcome]:
        ids = {one.labels.camera_id for one in self._wanted if one.labels.camera_id is not None}
        cameras: Mapping[str, Camera] = {}
        if ids:
            cameras = await self._pipeline.stored(partial(self._pipeline.gallery.find_cameras, ids))
        self._pictures = [one.picture(cameras) for one in self._wanted]
        if any(one.key is not None for one in self._wanted):
            # This hashes the bytes of all images, so not on the event loop.
            self._requests = await self._pipeline.stored(self._all_requests)
        self._find_repeats()
        await self._find_enrolled()
        await self._embed_all(self._open())
        await retried(self._store)
        for place, first in self._same.items():
            outcome = self._outcomes[first]
            self._outcomes[place] = (
                Enrolled(outcome.item, new=False) if isinstance(outcome, Enrolled) else outcome
            )
        return [self._outcomes[place] for place in range(len(self._wanted))]

    def _all_requests(self) -> list[RequestKey | None]:
        return [
            one.request(picture) for one, picture in zip(self._wanted, self._pictures, strict=True)
        ]

    def _open(self) -> list[int]:
        """Places without an outcome so far."""
        everyone = range(len(self._wanted))
        return [p for p in everyone if p not in self._outcomes and p not in self._same]

    def _find_repeats(self) -> None:
        """Find keys that occur twice in the batch itself."""
        first: dict[str, int] = {}
        for place, request in enumerate(self._requests):
            if request is None:
                continue
            before = first.setdefault(request.key, place)
            if before == place:
                continue
            if self._requests[before] == request:
                self._same[place] = before
            else:
                self._outcomes[place] = IdempotencyConflict(
                    "this key stands for other content in the same batch; give it another one"
                )

    async def _find_enrolled(self) -> None:
        """Find items that were enrolled earlier under the same keys."""
        keyed = [(place, request) for place in self._open() if (request := self._requests[place])]
        if keyed:
            self._outcomes |= await self._pipeline.stored(partial(self._lookup, keyed))

    def _lookup(self, keyed: Sequence[tuple[int, RequestKey]]) -> dict[int, Outcome]:
        earlier = self._pipeline.gallery.enrolled_by_each([request for _, request in keyed])
        return {
            place: Enrolled(one, new=False) if isinstance(one, Item) else one
            for place, request in keyed
            if (one := earlier.get(request.key)) is not None
        }

    async def _embed_all(self, places: Sequence[int]) -> None:
        window = self._window()
        await gathered(
            self._embed(place, nullcontext() if at < _AHEAD else window)
            for at, place in enumerate(places)
        )

    def _window(self) -> asyncio.Semaphore:
        """What all requests of this caller share, whose images get places in order of arrival.

        A stream is sent in several requests side by side. If they took turns, they would be
        finished together, and nothing would be embedded while all are stored and others sent.
        """
        windows, owner = self._pipeline.windows, self._share.owner
        window = windows.get(owner)
        if window is None:
            engine = self._pipeline.engine
            places = _WINDOW * engine.batcher.max_batch * engine.embedder.backend.streams
            window = windows[owner] = asyncio.Semaphore(places)
        return window

    async def _embed(self, place: int, window: AbstractAsyncContextManager[None]) -> None:
        async with window:
            try:
                self._embedded[place] = await self._pipeline.embedded(
                    self._pictures[place], self._share
                )
            except ServiceError as error:
                self._outcomes[place] = error

    async def _store(self) -> None:
        self._pipeline.gallery.refuse_stale()
        engine = self._pipeline.engine
        stale = [p for p in self._open() if self._embedded[p].engine is not engine]
        await self._embed_all(stale)
        places = self._open()
        if not places:
            return
        new = [self._wanted[p].item(self._embedded[p], self._requests[p]) for p in places]
        rows = torch.stack([self._embedded[place].features for place in places])
        add = partial(self._pipeline.gallery.add, new, rows, model=engine.model)
        started = time.perf_counter()
        try:
            items = await self._pipeline.with_crops(add)
        except IdempotencyConflict:
            # Another request enrolled one of the keys since: that one is found now.
            await self._find_enrolled()
            raise
        self._pipeline.note("store", time.perf_counter() - started)
        self._outcomes |= {
            place: Enrolled(item, new=True) for place, item in zip(places, items, strict=True)
        }
