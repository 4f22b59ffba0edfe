"""The path of an enrollment and of a query, off the event loop: every step is bounded.

bytes → decoding process → batcher → engine → y → gallery.add                            (enroll)
bytes → decoding process → batcher → engine → x, γ, β → gallery.search → ranked items    (query)
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from anyio import create_task_group, sleep
from anyio.abc import TaskGroup
from torch import Tensor

from model.pictures import Polarity
from service.embedding.embedder import Embedder
from service.embedding.engine import EmbeddingEngine
from service.errors import EmbeddingFailed, ModelVersionConflict, ServiceError
from service.gallery import Act, Camera, Gallery
from service.images import Decoders
from service.images.decode import STORED_LIMITS, Crop, Modality, ModalitySource, Picture
from service.images.turns import Share
from service.kit.concurrency import gathered, in_thread
from service.observability.metrics import Metrics
from service.observability.tracing import Tracing
from service.pipeline.audit_writer import AuditWriter
from service.pipeline.conflicts import retried
from service.pipeline.refusals import Refusals
from service.pipeline.search_batcher import EmbeddedQuery, Ranking, Search, SearchBatcher
from service.pipeline.self_check import SelfCheck
from service.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

_Decode = Callable[[Picture, int, int], Future[Crop]]
"""Lets a picture wait for its turn. Height and width are those of the network's input."""

# SQLite has one writer; readers of a page or an image are short.
_STORE_THREADS = 8
_RETAIN_EVERY = 600.0  # seconds
_LEAD_EVERY = 1.0  # seconds between two looks at whether this replica leads


@dataclass(frozen=True)
class Answer:
    """A ranking, and the modality that its query was taken for.

    polarity: of its infrared images, None without one. model: fingerprint of the checkpoint.
    timings_ms: of decode, queue, embed, recall, rescore, rerank, fetch, and total.
    """

    ranking: Ranking
    modality: Modality | Literal["mixed"]
    modality_source: ModalitySource
    polarity: Polarity | None
    model: str
    timings_ms: dict[str, float]


class Embedding(NamedTuple):
    """A decoded crop, its features P×D by an engine, and the seconds of decode, queue and embed."""

    crop: Crop
    features: Tensor
    engine: EmbeddingEngine
    seconds: dict[str, float]


class _Decoded(NamedTuple):
    """A crop at the input size of `engine`, and the seconds that it took."""

    crop: Crop
    engine: EmbeddingEngine
    seconds: float


class Pipeline:
    """Runs queries, and what enrollments share with them.

    engine: the one in use; see `switch`. checker: decodes for the self-check only, which thus never
    waits behind uploads. The caller closes gallery and decoders.
    """

    def __init__(
        self,
        embedder: Embedder,
        gallery: Gallery,
        decoders: Decoders,
        checker: Decoders,
        settings: Settings,
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self.gallery = gallery
        self._decoders, self._checker, self._settings = decoders, checker, settings
        self._metrics, self._tracing = metrics, tracing
        self.engine = self._engine_of(embedder)
        self._background: TaskGroup | None = None
        self.retention_waits = False  # what is too old stays for now
        self._searches = SearchBatcher(gallery)
        self._storing = ThreadPoolExecutor(_STORE_THREADS, "store")
        self._with_crops = self._storing
        if settings.crops_url is not None:
            self._with_crops = ThreadPoolExecutor(_STORE_THREADS, "crops")
        self.audit_writer = AuditWriter(gallery, metrics.audit_failures.inc)
        self.refusals = Refusals(self.audit_writer)
        self.self_check = SelfCheck(self._check)

    async def run(self) -> None:
        """Run the background work: embedding, self-check, retention. Until cancelled."""
        async with create_task_group() as group:
            self._background = group
            group.start_soon(self.engine.run)
            group.start_soon(self.self_check.run)
            group.start_soon(self.refusals.run)
            group.start_soon(self._retain)

    def switch(self, embedder: Embedder) -> None:
        """Embed with another checkpoint from now on; call it when the gallery has switched.

        Crops that wait for the previous engine are still embedded there, refused by the gallery as
        those of another checkpoint, and embedded again. Then the previous engine is released.
        """
        assert self._background is not None
        self.engine.batcher.retire()
        gc.unfreeze()  # otherwise the previous engine, which `service.app` froze, would stay
        engine = self._engine_of(embedder)
        self._background.start_soon(engine.run)
        self.engine = engine

    def _engine_of(self, embedder: Embedder) -> EmbeddingEngine:
        """An engine for the checkpoint that is used from now on, which the metrics name."""
        self._metrics.use(
            fingerprint=embedder.info.fingerprint,
            device=embedder.device,
            runtime=embedder.runtime,
        )
        return EmbeddingEngine(embedder, self._settings, self._metrics.batch)

    def note(self, stage: str, seconds: float) -> None:
        """Record that a stage of the current request has ended, after `seconds`."""
        self._metrics.stage(stage, seconds)
        self._tracing.stage(stage, seconds)

    def close(self) -> None:
        """End the threads, once nothing is in progress."""
        self._with_crops.shutdown(cancel_futures=True)
        self._storing.shutdown(cancel_futures=True)
        self._searches.close()
        self.refusals.write()
        self.audit_writer.close()

    async def stored(self, call: Callable[[], T]) -> T:
        """Run a call to the gallery that reads or changes it, in a thread."""
        return await in_thread(self._storing, call)

    async def with_crops(self, call: Callable[[], T]) -> T:
        """The same for a call that may wait for the object storage, which no other call waits for.

        Where there is none, these are calls as the others.
        """
        return await in_thread(self._with_crops, call)

    async def camera(self, camera_id: str | None) -> Camera | None:
        """What is known of a camera, now: another replica may just have changed it."""
        if camera_id is None:
            return None
        found = await self.stored(partial(self.gallery.find_cameras, [camera_id]))
        return found.get(camera_id)

    def decode_stored(self, picture: Picture, height: int, width: int) -> Crop:
        """Decode a crop of the gallery in one of the decoding processes. Raises ServiceError."""
        return self._decoders.decode(picture, height, width, STORED_LIMITS)

    def submit_stored(
        self, picture: Picture, height: int, width: int, share: Share
    ) -> Future[Crop]:
        """The same for a request, whose share it is: it waits for its turn among the others."""
        return self._decoders.submit(picture, height, width, share, STORED_LIMITS)

    def share(self, actor: str) -> Share:
        """A request's share of the decoders. actor: the caller, as it takes turns with others."""
        return Share(actor, self._settings.decode_budget)

    async def embedded(self, picture: Picture, share: Share) -> Embedding:
        """Decode and embed one picture to enroll. share: of its request. Raises ServiceError."""
        decode = partial(self._decoders.submit, share=share)
        return await self._decoded_and_embedded(picture, decode, query=False)

    async def _check(self, picture: Picture) -> Embedding:
        decode = partial(self._checker.submit, share=Share("self-check"))
        return await self._decoded_and_embedded(picture, decode, query=True)

    async def _decoded_and_embedded(
        self, picture: Picture, decode: _Decode, *, query: bool
    ) -> Embedding:
        async def attempt() -> Embedding:
            with self.engine.batcher.in_flight():
                return await self._embedded(await self._decoded(picture, decode), query=query)

        return await retried(attempt)

    async def query(self, pictures: Sequence[Picture], search: Search, actor: str) -> Answer:
        """Rank the gallery for one person seen in 1 to 16 pictures, which are fused.

        actor: the caller, for the audit log, which is on the disk before the answer is given.
        Raises ServiceError.
        """
        with self.engine.batcher.in_flight(len(pictures)):
            return await self._query(pictures, search, actor)

    async def _query(self, pictures: Sequence[Picture], search: Search, actor: str) -> Answer:
        self.gallery.refuse_stale()  # at once, and not behind what waits for the database
        started = time.perf_counter()
        share = self.share(actor)
        decoded = await self._all_decoded(pictures, share)
        modalities = {one.crop.modality for one in decoded}
        modality = modalities.pop() if len(modalities) == 1 else "mixed"
        details = {"images": len(pictures), "modality": modality, **_described(search)}
        act = Act(actor, "query", details=details, persons=search.filters.person_id)
        noting = asyncio.create_task(self.audit_writer.note(act))

        async def attempt() -> Answer:
            nonlocal decoded
            self.gallery.refuse_stale()
            if any(one.engine is not self.engine for one in decoded):  # changed meanwhile
                decoded = await self._all_decoded(pictures, share)
            return await self._answer(decoded, modality, search, started)

        try:
            return await retried(attempt)
        finally:
            await noting

    async def _all_decoded(self, pictures: Sequence[Picture], share: Share) -> list[_Decoded]:
        decode = partial(self._decoders.submit, share=share)

        async def named(place: int, picture: Picture) -> _Decoded:
            try:
                return await self._decoded(picture, decode)
            except ServiceError as error:
                if len(pictures) > 1 and error.code.startswith("image_"):
                    error.detail = f"image {place} of {len(pictures)}: {error.detail}"
                raise

        return await gathered(named(place, one) for place, one in enumerate(pictures, start=1))

    async def _decoded(self, picture: Picture, decode: _Decode) -> _Decoded:
        engine = self.engine
        config = engine.embedder.info.config
        started = time.perf_counter()
        answer = decode(picture, config.input_height, config.input_width)
        crop = await asyncio.wrap_future(answer)
        if picture.by_camera and crop.modality_source == "given":
            crop = replace(crop, modality_source="camera")
        took = time.perf_counter() - started
        self.note("decode", took)
        return _Decoded(crop, engine, took)

    async def _embedded(self, decoded: _Decoded, *, query: bool) -> Embedding:
        crop, engine, took = decoded
        features, waited, embedding = await engine.batcher.embed(crop, query=query)
        if not features.isfinite().all():
            raise EmbeddingFailed(
                "the features of the image are not finite; the checkpoint is damaged or untrained"
            )
        self.note("queue", waited)
        self.note("embed", embedding)
        seconds = {"decode": took, "queue": waited, "embed": embedding}
        return Embedding(crop, features, engine, seconds)

    async def _answer(
        self,
        decoded: Sequence[_Decoded],
        modality: Modality | Literal["mixed"],
        search: Search,
        started: float,
    ) -> Answer:
        engine = decoded[0].engine
        if any(one.engine is not engine for one in decoded):
            raise ModelVersionConflict("the checkpoint was changed between two of the images")
        seen = await gathered(self._embedded(one, query=True) for one in decoded)
        features = torch.stack([one.features for one in seen])
        ranking = await self._searches.rank(
            EmbeddedQuery(engine.embedder, features, modality, search)
        )
        for stage, milliseconds in ranking.result.timings_ms.items():
            self.note(stage, milliseconds / 1000)
        slowest = {stage: max(one.seconds[stage] for one in seen) for stage in seen[0].seconds}
        return Answer(
            ranking=ranking,
            modality=modality,
            modality_source=seen[0].crop.modality_source,
            polarity=next((one.crop.polarity for one in seen if one.crop.polarity), None),
            model=engine.model,
            timings_ms={
                **{stage: 1000 * seconds for stage, seconds in slowest.items()},
                **ranking.result.timings_ms,
                "total": 1000 * (time.perf_counter() - started),
            },
        )

    async def _retain(self) -> None:
        """Delete items that are older than `retention_days`, while the clock can be believed."""
        days = self._settings.retention_days
        replicas = self.gallery.replicas
        while True:
            if replicas is not None and not replicas.leads:
                await sleep(_LEAD_EVERY)  # the leader does it for all
                continue
            try:
                gone = await self.stored(partial(self.gallery.retain, days))
                self.retention_waits = False
                if gone:
                    log.info("%d items were older than %g days and are deleted", gone, days)
            except ServiceError as error:
                self.retention_waits = days is not None
                log.warning("the age of items is not looked at yet: %s", error.detail)
            await sleep(_RETAIN_EVERY)


def _described(search: Search) -> dict[str, Any]:
    """What the audit log says about a search, without the persons it is for."""
    return {
        "top_k": search.top_k,
        "exhaustive": search.exhaustive,
        **search.filters.described(),
    }
