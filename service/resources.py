"""What one service process holds open, opened in order and closed in reverse."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import torch

from model.cores import allowed_cores
from service.auth.keys import Keyring
from service.auth.rate_limit import Limit, Rates
from service.embedding.embedder import Backend, Embedder
from service.embedding.verdict import Ahead
from service.errors import RuntimeUnavailable
from service.gallery import Gallery
from service.gallery.index.figures import Figures, FiguresError, IndexChoice
from service.gallery.index.gpu_index import IndexKindError, check_kind
from service.http.admission import Admission
from service.kit.concurrency import in_thread
from service.observability.gpu import watch_gpu
from service.observability.logs import dropped_lines
from service.observability.metrics import Metrics
from service.observability.tracing import Tracing
from service.pipeline.begun import Begun, begun
from service.pipeline.pipeline import Pipeline
from service.pipeline.reembedding_job import ReembeddingJob
from service.scale.engine import RayEngine
from service.settings import Settings

log = logging.getLogger(__name__)

_RATE_THREADS = 4


@dataclass(frozen=True)
class Resources:
    """What every request may use."""

    settings: Settings
    keyring: Keyring
    rates: Rates
    gallery: Gallery
    admission: Admission
    pipeline: Pipeline
    reembedder: ReembeddingJob
    metrics: Metrics


class State(TypedDict):
    """The application's lifespan state: `request.state.resources`."""

    resources: Resources


@contextmanager
def open_resources(
    settings: Settings,
    metrics: Metrics,
    tracing: Tracing,
    backend: Backend | None = None,
    started: Begun | None = None,
) -> Iterator[Resources]:
    """Load the checkpoint, open the gallery and start the processes that decode.

    backend: what embeds, None for a network in this process. started: what the caller has begun
    already, and ends; None begins it here.
    Raises CheckpointError and ServiceError (a locked or unwritable data folder), each one sentence.
    """
    with ExitStack() as stack:
        # Triton keeps what it compiled; a container can load that from no other folder.
        compiled = settings.data_dir.absolute() / "cache" / "triton"
        os.environ.setdefault("TRITON_CACHE_DIR", str(compiled))
        # First, so that they start while the network is loaded, and before the gallery, which
        # leaves alone only the memory that others have taken by then.
        started = started or stack.enter_context(begun(settings, network=backend is None))
        embedder = _embedder(settings, backend, started.network)
        gallery = stack.enter_context(closing(_gallery(settings, embedder, stack)))
        stack.callback(tracing.close)
        admission = Admission(
            receiving=settings.max_receiving,
            working=settings.max_pending,
            bytes=settings.max_pending_bytes,
        )
        pipeline = Pipeline(
            embedder, gallery, started.requests, started.checks, settings, metrics, tracing
        )
        stack.callback(pipeline.close)
        reembedder = ReembeddingJob(pipeline, settings)
        stack.callback(reembedder.close)
        _watch(metrics, gallery, admission, pipeline)
        if embedder.device.startswith("cuda"):
            watch_gpu(metrics, embedder.device)
        log.info(
            "%d items; %s on %s, %s",
            len(gallery),
            embedder.runtime,
            embedder.device,
            embedder.precision,
        )
        del embedder  # the pipeline owns it, and releases it when another one takes over
        yield Resources(
            settings=settings,
            keyring=Keyring(settings.api_keys_file),
            rates=_rates(settings, gallery, stack),
            gallery=gallery,
            admission=admission,
            pipeline=pipeline,
            reembedder=reembedder,
            metrics=metrics,
        )


def _rates(settings: Settings, gallery: Gallery, stack: ExitStack) -> Rates:
    """Where several replicas share a database, each key's requests are counted for all of them."""
    replicas = gallery.replicas
    if replicas is None:
        return Rates(settings.rate_limit)
    threads = stack.enter_context(ThreadPoolExecutor(_RATE_THREADS, "rates"))

    async def shared(who: str, rate: str, limits: Sequence[Limit]) -> float:
        return await in_thread(threads, partial(replicas.count_request, who, rate, limits))

    return Rates(settings.rate_limit, shared)


def _embedder(settings: Settings, backend: Backend | None, network: Ahead | None) -> Embedder:
    if backend is not None:  # the network here computes γ and β only
        embedder = Embedder(settings.checkpoint, "cpu", "torch")
        embedder.backend, embedder.runtime = backend, "ray"
        return embedder
    return Embedder(
        settings.checkpoint,
        device=settings.device,
        runtime=settings.runtime,
        cache_dir=settings.data_dir / "cache",
        known=None if network is None else network.take,
    )


def _gallery(settings: Settings, embedder: Embedder, stack: ExitStack) -> Gallery:
    engine = _engine(settings) if settings.engine == "ray" else None
    if engine is not None:
        stack.callback(engine.close)
    return Gallery.open(
        settings.data_dir,
        embedder.info,
        device=embedder.device,
        database_url=settings.database_url,
        candidates=settings.candidates,
        index=_index(settings, embedder.device),
        clock_confirmed=settings.clock_confirmed,
        crops_url=settings.crops_url,
        crops_inline_bytes=settings.crops_inline_bytes,
        follow=None if engine is None else engine.follow,
    )


def _engine(settings: Settings) -> RayEngine:
    """Join the cluster, or start one. Raises RuntimeUnavailable."""
    return RayEngine(
        settings.shards,
        database_url=settings.database_url,
        device=settings.device,
        kind=settings.index,
        address=settings.ray_address or os.environ.get("RAY_ADDRESS"),
        cores=allowed_cores(),
        seconds=settings.shard_timeout,
        partial=settings.partial_answers,
    )


def _index(settings: Settings, device: str) -> IndexChoice:
    """The forced kind, or the figures to choose one by. Raises RuntimeUnavailable."""
    try:
        if settings.index is not None:
            check_kind(settings.index, device)
            return settings.index
        if settings.index_figures is None or device == "cpu":
            return None
        figures = Figures.read(settings.index_figures)
    except (IndexKindError, FiguresError) as error:
        raise RuntimeUnavailable(str(error)) from error
    if figures.gpu == (here := torch.cuda.get_device_name(device)):
        return figures
    log.warning("index_figures are of the GPU %s and this is %s: measure here", figures.gpu, here)
    return None


def _watch(metrics: Metrics, gallery: Gallery, admission: Admission, pipeline: Pipeline) -> None:
    """Register gauges."""
    metrics.watch(
        "cmt_gallery_items", "Items that queries search.", lambda: gallery.statistics.items
    )
    metrics.watch(
        "cmt_gallery_bytes",
        "Memory of the features and filter columns.",
        lambda: gallery.statistics.feature_bytes + gallery.statistics.column_bytes,
    )
    metrics.watch(
        "cmt_gallery_lacks_memory",
        "1 while items are stored that memory has no room for, so that no query finds them.",
        lambda: gallery.lacks_memory,
    )
    metrics.watch(
        "cmt_gallery_spilled_items",
        "Items that a GPU's memory has no room for, searched in the host's.",
        lambda: gallery.spilled,
    )
    metrics.watch(
        "cmt_gallery_device_bytes",
        "Memory of the features on a GPU, part of cmt_gallery_bytes.",
        lambda: gallery.statistics.device_bytes,
    )
    metrics.watch(
        "cmt_shards", "Shards of the gallery; 1 in one process.", lambda: gallery.presence.total
    )
    metrics.watch(
        "cmt_shards_ok",
        "Shards that answer; where some do not, answers leave out what those have.",
        lambda: gallery.presence.answered,
    )
    replicas = gallery.replicas
    metrics.watch(
        "cmt_replica_lag_seconds",
        "Age of the state of a shared database that is surely in what is searched.",
        lambda: gallery.lag,
    )
    metrics.watch(
        "cmt_replicas",
        "Living replicas on the database, this one included.",
        lambda: 1 if replicas is None else 1 + replicas.others,
    )
    metrics.watch(
        "cmt_replica_leads",
        "1 in the replica that does the background work for all.",
        lambda: replicas is None or replicas.leads,
    )
    metrics.watch(
        "cmt_clock_ahead_seconds",
        "By how much this machine's clock is ahead of a shared database's.",
        lambda: 0.0 if replicas is None else replicas.clock_ahead,
    )
    metrics.watch(
        "cmt_crops_unavailable",
        "1 while the object storage of the crops cannot be used.",
        lambda: gallery.crops_available is False,
    )
    metrics.watch(
        "cmt_objects_pending",
        "Objects that the object storage is still to delete, such as those of erased items.",
        lambda: gallery.pending_objects,
    )
    metrics.watch(
        "cmt_log_lines_dropped", "Lines of the log that nobody read in time.", dropped_lines
    )
    metrics.watch(
        "cmt_retention_waits",
        "1 while too old items are not deleted, as where the clock cannot be right.",
        lambda: pipeline.retention_waits,
    )
    metrics.watch(
        "cmt_uploads_receiving", "Uploads whose body arrives.", lambda: admission.receiving
    )
    metrics.watch(
        "cmt_uploads_pending",
        "Uploads that have arrived and are worked on.",
        lambda: admission.working,
    )
    metrics.watch(
        "cmt_embed_waiting",
        "Images that wait for the network.",
        lambda: len(pipeline.engine.batcher),
    )
