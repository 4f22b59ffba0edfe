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
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from anyio import create_task_group, sleep
from anyio.abc import TaskGroup
from torch import Tensor

from model.config import MODALITIES
from model.pictures import Polarity
from service.embedding.embedder import Embedder
from service.embedding.engine import EmbeddingEngine
from service.errors import EmbeddingFailed, ModelVersionConflict, ServiceError
from service.gallery import Act, Camera, Gallery
from service.images.decode import STORED_LIMITS, Crop, Modality, ModalitySource, Picture
from service.images.pool import Decoders
from service.images.turns import Share
from service.kit.concurrency import gathered, in_thread
from service.observability.metrics import Metrics
from service.observability.stages import Stages
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
    """

    ranking: Ranking
    modality: Modality | Literal["mixed"]
    modality_source: ModalitySource
    polarity: Polarity | None
    model: str


class Embedding(NamedTuple):
    """A decoded crop, its features P×D by an engine, and the seconds of decode, queue and embed."""

    crop: Crop
    features: Tensor
    engine: EmbeddingEngine
    seconds: dict[str, float]


class _Decoded(NamedTuple):
    """A crop at the input size of `engine`, and the seconds that it took.

    Those that its process did not compute it has waited, for its turn or for the process.
    """

    crop: Crop
    engine: EmbeddingEngine
    seconds: float

    @property
    def computed(self) -> float:
        return min(self.crop.seconds, self.seconds)


@dataclass(eq=False)
class _QueryWork:
    """One query on its way.

    stages: of its request. gone: nobody waits for it any more. noted: done once it is in the audit
    log.
    """

    pictures: Sequence[Picture]
    search: Search
    actor: str
    share: Share
    stages: Stages
    gone: bool = False
    noted: Future[None] | None = None


class _NotAlone(Exception):  # noqa: N818 (no error: the query goes the way of the others)
    """Something else is being worked on."""


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
        # Of enrollments, by caller, as long as one is in progress.
        self.windows: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._searches = SearchBatcher(gallery)
        self._alone, self._alone_busy = ThreadPoolExecutor(1, "alone"), False
        self._warm = False  # what a lone query needs is set up
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

    def _note_stages(self, stages: Stages) -> None:
        now = time.perf_counter()
        for stage, seconds in stages.seconds.items():
            if stage != "receive":  # noted when it was over, as of every upload
                self._metrics.stage(stage, seconds)
                self._tracing.stage(stage, seconds, ago=now - stages.ended[stage])

    def close(self) -> None:
        """End the threads, once nothing is in progress."""
        self._with_crops.shutdown(cancel_futures=True)
        self._storing.shutdown(cancel_futures=True)
        self._searches.close()
        self._alone.shutdown(cancel_futures=True)
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
        embedding = await self._decoded_and_embedded(picture, decode, query=True)
        if not self._warm:
            self._warm = True
            try:
                await in_thread(self._alone, partial(self._warm_up, picture))
            except Exception:  # queries will tell, and some may be answered
                log.warning("the built-in image cannot be searched for", exc_info=True)
        return embedding

    def _warm_up(self, picture: Picture) -> None:
        """Go the way of a lone query once: who asks first need not wait for what it sets up."""
        engine = self.engine
        config = engine.embedder.info.config
        crop = self._decoders.decode(picture, config.input_height, config.input_width)
        for modality in MODALITIES:
            embedded = engine.batcher.embed_at_once(replace(crop, modality=modality))
            features = _finite(embedded.features)[None]
            self._searches.rank_at_once(
                EmbeddedQuery(engine.embedder, features, modality, Search())
            )

    async def _decoded_and_embedded(
        self, picture: Picture, decode: _Decode, *, query: bool
    ) -> Embedding:
        async def attempt() -> Embedding:
            with self.engine.batcher.in_flight():
                return await self._embedded(await self._decoded(picture, decode), query=query)

        embedding = await retried(attempt)
        for stage, seconds in embedding.seconds.items():
            self.note(stage, seconds)
        return embedding

    async def query(
        self,
        pictures: Sequence[Picture],
        search: Search,
        actor: str,
        stages: Stages | None = None,
    ) -> Answer:
        """Rank the gallery for one person seen in 1 to 16 pictures, which are fused.

        actor: the caller, for the audit log, which is on the disk before the answer is given.
        stages: of the request, which go on here. Raises ServiceError.
        """
        work = _QueryWork(pictures, search, actor, self.share(actor), stages or Stages())
        with self.engine.batcher.in_flight(len(pictures)):
            self.gallery.refuse_stale()  # at once, and not behind what waits for the database
            try:
                if self._is_alone(work):
                    with suppress(_NotAlone, ModelVersionConflict):
                        return await self._in_one_go(work)
                return await self._in_batches(work)
            finally:
                self._note_stages(work.stages)

    def _is_alone(self, work: _QueryWork) -> bool:
        """Whether nothing else is worked on that the query would have to share something with.

        An exhaustive one takes the way where no two of them run at the same time.
        """
        lone = self.engine.batcher.pictures == 1 and not self._alone_busy
        return lone and not work.search.exhaustive

    async def _in_one_go(self, work: _QueryWork) -> Answer:
        """All steps in one thread: a lone query would wait for each hand-over to another one.

        Raises _NotAlone where it would have to wait for something else, and ModelVersionConflict.
        """

        self._alone_busy = True
        answer = self._alone.submit(copy_context().run, self._computed, work)
        answer.add_done_callback(self._leave)  # also where it is cancelled before it has begun
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            work.gone = True
            raise

    def _leave(self, _: Future[Answer]) -> None:
        self._alone_busy = False

    def _computed(self, work: _QueryWork) -> Answer:
        engine, (picture,) = self.engine, work.pictures
        config = engine.embedder.info.config
        started = time.perf_counter()
        work.stages.end("queue")
        crop = self._decoders.decode_at_once(
            picture, config.input_height, config.input_width, work.share
        )
        if crop is None or work.gone:
            raise _NotAlone
        decoded = _Decoded(_read(picture, crop), engine, time.perf_counter() - started)
        work.stages.end("queue", decode=decoded.computed)
        self._note_act(work, [decoded])
        try:
            embedded = engine.batcher.embed_at_once(decoded.crop)
            features = _finite(embedded.features)
            work.stages.end("queue", embed=embedded.took)
            if work.gone:
                raise _NotAlone
            ranking = self._searches.rank_at_once(
                EmbeddedQuery(engine.embedder, features[None], crop.modality, work.search)
            )
            work.stages.end("queue", **ranking.seconds)
        finally:
            assert work.noted is not None
            work.noted.result()
        work.stages.end("audit")
        return _answer_of(ranking, [decoded])

    async def _in_batches(self, work: _QueryWork) -> Answer:
        """Each step together with that of other requests."""
        decoded = await self._all_decoded(work.pictures, work.share)
        slowest = max(decoded, key=lambda one: one.seconds)
        work.stages.end("queue", decode=slowest.computed)
        if work.noted is None:
            self._note_act(work, decoded)

        async def attempt() -> Answer:
            nonlocal decoded
            self.gallery.refuse_stale()
            if any(one.engine is not self.engine for one in decoded):  # changed meanwhile
                decoded = await self._all_decoded(work.pictures, work.share)
            return await self._answer(decoded, work)

        try:
            return await retried(attempt)
        finally:
            assert work.noted is not None
            await asyncio.wrap_future(work.noted)
            work.stages.end("audit")

    def _note_act(self, work: _QueryWork, decoded: Sequence[_Decoded]) -> None:
        """Begin to write a query into the audit log, which goes on while it is embedded."""
        search = work.search
        details = {
            "images": len(work.pictures),
            "modality": _modality(decoded),
            "top_k": search.top_k,
            "exhaustive": search.exhaustive,
            **search.filters.described(),  # without the persons
        }
        act = Act(work.actor, "query", details=details, persons=search.filters.person_id)
        work.noted = self.audit_writer.post(act)

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
        crop = _read(picture, await asyncio.wrap_future(answer))
        return _Decoded(crop, engine, time.perf_counter() - started)

    async def _embedded(self, decoded: _Decoded, *, query: bool) -> Embedding:
        crop, engine, took = decoded
        features, waited, embedding = await engine.batcher.embed(crop, query=query)
        seconds = {"decode": decoded.computed, "queue": waited + took - decoded.computed}
        return Embedding(crop, _finite(features), engine, {**seconds, "embed": embedding})

    async def _answer(self, decoded: Sequence[_Decoded], work: _QueryWork) -> Answer:
        engine = decoded[0].engine
        if any(one.engine is not engine for one in decoded):
            raise ModelVersionConflict("the checkpoint was changed between two of the images")
        seen = await gathered(self._embedded(one, query=True) for one in decoded)
        work.stages.end("queue", embed=max(one.seconds["embed"] for one in seen))
        features = torch.stack([one.features for one in seen])
        ranking = await self._searches.rank(
            EmbeddedQuery(engine.embedder, features, _modality(decoded), work.search)
        )
        work.stages.end("queue", **ranking.seconds)
        return _answer_of(ranking, decoded)

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


def _read(picture: Picture, crop: Crop) -> Crop:
    """The crop of a picture, with where its modality is from."""
    if picture.by_camera and crop.modality_source == "given":
        return replace(crop, modality_source="camera")
    return crop


def _finite(features: Tensor) -> Tensor:
    """The features. Raises EmbeddingFailed where they are no numbers to rank by."""
    # By NumPy, which keeps the interpreter's lock: waiting for it takes longer than this.
    if not np.isfinite(features.numpy()).all():
        raise EmbeddingFailed(
            "the features of the image are not finite; the checkpoint is damaged or untrained"
        )
    return features


def _modality(decoded: Sequence[_Decoded]) -> Modality | Literal["mixed"]:
    """What a query of these images is taken for."""
    modalities = {one.crop.modality for one in decoded}
    return modalities.pop() if len(modalities) == 1 else "mixed"


def _answer_of(ranking: Ranking, decoded: Sequence[_Decoded]) -> Answer:
    return Answer(
        ranking=ranking,
        modality=_modality(decoded),
        modality_source=decoded[0].crop.modality_source,
        polarity=next((one.crop.polarity for one in decoded if one.crop.polarity), None),
        model=decoded[0].engine.model,
    )
