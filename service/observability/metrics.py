"""What Prometheus reads at /metrics. Every name starts with `cmt_`; docs/operations.md lists them.

Labels are routes, stages, status and codes: never a person, a camera, an id or a key.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The metrics of one service process. Thread-safe."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "cmt_http_requests",
            "Requests answered, by method, route and status.",
            ("method", "route", "status"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "cmt_http_request_seconds",
            "From a request's headers to the end of its answer.",
            ("method", "route"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejections = Counter(
            "cmt_rejections",
            "Requests and images refused, by the code of the problem.",
            ("code",),
            registry=registry,
        )
        self._stages = Histogram(
            "cmt_stage_seconds",
            "Time in each stage: receive, queue, decode, embed, modulate, recall, rescore, rerank, "
            "fetch, rank, audit, store.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        # A dozen for each query; looking a label up takes longer than counting.
        self._stage = lru_cache(maxsize=64)(self._stages.labels)
        self._batch_size = Histogram(
            "cmt_embed_batch_size",
            "Images embedded at once.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            registry=registry,
        )
        self.audit_failures = Counter(
            "cmt_audit_failures",
            "Entries of the audit log that could not be written at once; they are tried again.",
            registry=registry,
        )
        Gauge(
            "cmt_start_time_seconds", "When the process started, in Unix time.", registry=registry
        ).set_to_current_time()
        self._model = Info("cmt_model", "The checkpoint in use.", registry=registry)

    def stage(self, name: str, seconds: float) -> None:
        """Record how long one request was in a stage."""
        self._stage(name).observe(seconds)

    def batch(self, size: int) -> None:
        """Record how many images were embedded at once."""
        self._batch_size.observe(size)

    def use(self, *, fingerprint: str, device: str, runtime: str) -> None:
        """Set which checkpoint is in use, on which device and runtime."""
        self._model.info({"fingerprint": fingerprint, "device": device, "runtime": runtime})

    def watch(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read at every scrape."""
        Gauge(name, description, registry=self._registry).set_function(value)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)
