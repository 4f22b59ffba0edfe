"""Optional traces: a span per request and one per stage, sent by OTLP where an endpoint is set."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Tracing:
    """Sends spans to an OTLP endpoint; does nothing without one.

    Needs the extra `otel` with an endpoint, which `Settings` checks.
    """

    def __init__(self, endpoint: str | None) -> None:
        self._provider: Any = None
        if endpoint is None:
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "cmt-reid"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("service")

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """The span of a request, a child of the one that its `traceparent` names.

        None where no endpoint is set.
        """
        if self._provider is None:
            yield None
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(headers)
        with self._tracer.start_as_current_span(name, context, SpanKind.SERVER) as span:
            yield span

    def stage(self, name: str, seconds: float, ago: float = 0.0) -> None:
        """Record a stage of the current request that took `seconds` and ended `ago`, or now."""
        if self._provider is not None:
            end = time.time_ns() - int(1e9 * ago)
            span = self._tracer.start_span(name, start_time=end - int(1e9 * seconds))
            span.end(end)

    def close(self) -> None:
        """Send the remaining spans."""
        if self._provider is not None:
            self._provider.shutdown()
