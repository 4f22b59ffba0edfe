"""The way of an enrollment and of a query, off the event loop: every step runs in a bounded thread.

bytes → images → embedder → y → gallery.add                            (enroll)
bytes → images → embedder → x, γ, β → gallery.search → ranked items    (query)
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from anyio import CapacityLimiter, create_task_group, to_thread
from torch import Tensor

from model import Modulation
from service.embedder import Embedder
from service.errors import Overloaded
from service.gallery import Filters, Gallery, Item, NewItem, RequestKey, SearchResult
from service.images import Box, Crop, ImageLimits, Modality, ModalitySource, decode
from service.settings import Settings

T = TypeVar("T")

# One embeds while the next one's tensors are made; the device serves one batch at a time anyway.
_EMBED_THREADS = 2
# SQLite has one writer; readers of a page or an image are short.
_STORE_THREADS = 8


@dataclass(frozen=True)
class Picture:
    """Uploaded bytes and how to read them."""

    data: bytes
    modality: Literal["auto", "rgb", "ir"] = "auto"
    box: Box | None = None


@dataclass(frozen=True)
class Labels:
    """What the sender of a crop knows of it."""

    person_id: str | None = None
    camera_id: str | None = None
    captured_at: datetime | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """How to rank. candidates: shortlist of the recall stage; None takes the gallery's default."""

    top_k: int = 20
    candidates: int | None = None
    exhaustive: bool = False
    modulation: bool = True
    group_by: Literal["person_id"] | None = None
    filters: Filters = field(default_factory=Filters)
    max_distance: float | None = None
    explain: bool = False


@dataclass(frozen=True)
class Answer:
    """A ranking, and what its query was taken for. timings_ms: decode, queue, embed, total too.

    similarities: of each hit, the probability that it shows the person of the query; None where
    the checkpoint is not calibrated for this query and gallery modality.
    """

    result: SearchResult
    similarities: list[float | None]
    modality: Modality | Literal["mixed"]
    modality_source: ModalitySource
    timings_ms: dict[str, float]


class Pipeline:
    """Runs enrollments and queries. Its embedder and gallery belong to whoever made it."""

    def __init__(self, embedder: Embedder, gallery: Gallery, settings: Settings) -> None:
        self.embedder = embedder
        self.gallery = gallery
        self._limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
        self._places = settings.max_pending
        self._decoding = CapacityLimiter(settings.decode_threads)
        self._embedding = CapacityLimiter(_EMBED_THREADS)
        self._storing = CapacityLimiter(_STORE_THREADS)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of `max_pending` places while an upload is read and worked on.

        Raises Overloaded, at once, when all are taken.
        """
        if self._places == 0:
            raise Overloaded(
                "the service has as many uploads as it can queue; try again in a second",
                headers={"Retry-After": "1"},
            )
        self._places -= 1
        try:
            yield
        finally:
            self._places += 1

    async def stored(self, call: Callable[[], T]) -> T:
        """Run a call to the gallery that reads or deletes."""
        return await to_thread.run_sync(call, limiter=self._storing)

    async def enroll(
        self, picture: Picture, labels: Labels, key: str | None = None
    ) -> tuple[Item, bool]:
        """Decode, embed and store one crop → (the item, whether it is new); durable on return.

        key: the client's Idempotency-Key. With the same content it gives the item stored before.
        Raises ServiceError, IdempotencyConflict among them.
        """
        request: RequestKey | None = None
        if key is not None:
            content = await to_thread.run_sync(_content, picture, labels, limiter=self._decoding)
            request = RequestKey(key, content)
            stored = await self.stored(partial(self.gallery.enrolled_by, request))
            if stored is not None:
                return stored, False
        [crop] = await self._decode([picture])
        features = await to_thread.run_sync(self.embedder.embed, [crop], limiter=self._embedding)
        new = NewItem(
            crop,
            person_id=labels.person_id,
            camera_id=labels.camera_id,
            captured_at=labels.captured_at,
            metadata=labels.metadata,
            request=request,
        )
        model = self.embedder.info.fingerprint
        [item] = await self.stored(partial(self.gallery.add, [new], features, model=model))
        return item, True

    async def query(self, pictures: Sequence[Picture], search: Search) -> Answer:
        """Rank the gallery for one person seen in 1 to 16 pictures. Raises ServiceError."""
        started = time.perf_counter()
        crops = await self._decode(pictures)
        decoded = time.perf_counter()
        x, modulation, begun = await to_thread.run_sync(
            self._represent, crops, limiter=self._embedding
        )
        embedded = time.perf_counter()
        modalities = {crop.modality for crop in crops}
        modality = modalities.pop() if len(modalities) == 1 else "mixed"
        result, similarities = await to_thread.run_sync(
            self._rank,
            *(x, modulation if search.modulation else None, modality, search),
            limiter=self._embedding,
        )
        return Answer(
            result=result,
            similarities=similarities,
            modality=modality,
            modality_source=crops[0].modality_source,
            timings_ms={
                "decode": 1000 * (decoded - started),
                "queue": 1000 * (begun - decoded),
                "embed": 1000 * (embedded - begun),
                **result.timings_ms,
                "total": 1000 * (time.perf_counter() - started),
            },
        )

    async def _decode(self, pictures: Sequence[Picture]) -> list[Crop]:
        crops: dict[int, Crop] = {}

        async def decode_one(place: int, picture: Picture) -> None:
            call = partial(
                decode,
                picture.data,
                modality=picture.modality,
                box=picture.box,
                limits=self._limits,
            )
            crops[place] = await to_thread.run_sync(call, limiter=self._decoding)

        if len(pictures) == 1:
            await decode_one(0, pictures[0])
        else:
            try:
                async with create_task_group() as group:
                    for place, picture in enumerate(pictures):
                        group.start_soon(decode_one, place, picture)
            except ExceptionGroup as several:
                raise several.exceptions[0] from several
        return [crops[place] for place in range(len(pictures))]

    def _represent(self, crops: Sequence[Crop]) -> tuple[Tensor, Modulation, float]:
        """Crops of one person → x: P×D, its γ and β (1×D each), and when the work began.

        Several crops are one query: x is the mean of their complete representations (normalised
        again where the checkpoint normalises), and γ, β are generated once, from that mean.
        """
        begun = time.perf_counter()
        x = self.embedder.embed(crops).mean(0)
        if self.embedder.info.config.normalise_test:
            x = torch.nn.functional.normalize(x.flatten(), dim=0).view_as(x)
        return x, self.embedder.modulation(x[None]), begun

    def _rank(
        self, x: Tensor, modulation: Modulation | None, modality: str, search: Search
    ) -> tuple[SearchResult, list[float | None]]:
        """The gallery's answer to x: P×D, and the similarity of each of its hits.

        Curves are fitted on queries of one image; a query of several is judged by the same ones,
        one of both modalities by none.
        """
        result = self.gallery.search(
            x,
            modulation,
            top_k=search.top_k,
            candidates=search.candidates,
            exhaustive=search.exhaustive,
            filters=search.filters,
            group_by=search.group_by,
            explain=search.explain,
            max_distance=search.max_distance,
            model=self.embedder.info.fingerprint,
        )
        calibration = self.embedder.info.calibration
        if calibration is None:
            return result, [None] * len(result.hits)
        return result, calibration.similarities(
            x,
            modulation,
            [hit.distance for hit in result.hits],
            query=modality,
            gallery=[hit.item.modality for hit in result.hits],
        )


def _content(picture: Picture, labels: Labels) -> str:
    """SHA-256 of all that an enrollment sends."""
    digest = hashlib.sha256(hashlib.sha256(picture.data).digest())
    captured = None if labels.captured_at is None else labels.captured_at.isoformat()
    rest = [picture.modality, picture.box, labels.person_id, labels.camera_id, captured]
    digest.update(json.dumps([*rest, labels.metadata], sort_keys=True).encode())
    return digest.hexdigest()
