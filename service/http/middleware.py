"""The middleware of every request.

Outermost first: `RequestLogMiddleware`, `SecurityHeaders`, `service.http.intake`,
`DrainMiddleware`, `CrossOrigin` where other origins are allowed, and `service.http.overload`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from secrets import token_hex
from typing import Final

import structlog
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import OriginRefused, ShuttingDown
from service.http import exception_handlers as problems
from service.kit.device_loss import report_loss
from service.kit.urls import route_path
from service.observability.logs import get_logger, log_often
from service.observability.metrics import Metrics
from service.observability.tracing import Tracing

log = get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Polled by monitoring; a service that shuts down still answers them.
_PROBES = frozenset({"/livez", "/readyz", "/metrics"})
# A client may send any method; only these become labels and log entries.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestLogMiddleware:
    """A request's id, log line, metrics and span, and the answer where the code raises.

    The id is the client's X-Request-ID if it is a plain one. The log line names the route, never
    the path or query, which may name persons.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self.app, self._metrics, self._tracing = app, metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else token_hex(16)
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        started = time.perf_counter()
        scope.setdefault("state", {})["started"] = started
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        with self._tracing.request(scope["method"], headers) as span:
            try:
                await self.app(scope, receive, observed)
            except Exception as error:
                report_loss(error)
                short = problems.shortage(error)
                if short is None:
                    log.exception("defect")
                else:
                    log.warning("shortage", detail=short.detail)
                if status == 0:
                    answer = problems.unexpected(Request(scope), error)
                    await answer(scope, receive, observed)
            finally:
                self._note(scope, request_id, status, time.perf_counter() - started, span)

    def _note(
        self, scope: Scope, request_id: str, status: int, seconds: float, span: object
    ) -> None:
        route = getattr(scope.get("route"), "path_format", "none")
        method = scope["method"] if scope["method"] in _METHODS else "any"
        counted = method if route != "none" else "any"
        # 499, nginx's code: the client was gone before there was an answer.
        status = status or 499
        self._metrics.requests.labels(counted, route, status).inc()
        self._metrics.request_seconds.labels(counted, route).observe(seconds)
        log_often(
            __name__,
            logging.DEBUG if route in _PROBES else logging.INFO,
            "request",
            request_id=request_id,
            method=method,
            route=route,
            status=status,
            ms=round(1000 * seconds, 1),
            client=(scope.get("client") or ("unknown", 0))[0],
            actor=scope.get("state", {}).get("actor"),
        )
        if span is not None:
            span.update_name(f"{counted} {route}")  # type: ignore[attr-defined]
            span.set_attribute("http.response.status_code", status)  # type: ignore[attr-defined]


class SecurityHeaders:
    """Nothing this service answers may be framed, sniffed, cached or load from elsewhere."""

    # The page and the documentation run their own scripts; everything else runs none. Pictures
    # that are not loaded from here (blob:) are those that somebody chose, or came with a key.
    PAGE = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    DATA = "default-src 'none'; frame-ancestors 'none'; sandbox"
    EVERY: Final = (
        (b"x-content-type-options", b"nosniff"),
        # Pages of `cors_origins` read by CORS, which this does not concern.
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"referrer-policy", b"no-referrer"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                given = dict(headers)
                page = given.get(b"content-type", b"").startswith(b"text/html")
                policy = self.PAGE if page else self.DATA
                headers += [(b"content-security-policy", policy.encode()), *self.EVERY]
                if b"cache-control" not in given:
                    headers.append((b"cache-control", b"no-store"))
            await send(message)

        wrapped = scope["type"] == "http"
        await self.app(scope, receive, send_with_headers if wrapped else send)


class CrossOrigin(CORSMiddleware):
    """Which other origins' pages may call the service; a refusal is a problem document."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        error = OriginRefused(
            f"a page may not call this so ({bytes(answer.body).decode().lower()}); the setting "
            "cors_origins lists the pages that may",
            headers={"Vary": "Origin"},
        )
        return problems.answer(error, "")


class DrainState:
    """Counts for a shutdown.

    in_flight: requests being worked on. closing: new ones are refused, for the reason `why`.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.closing = False
        self.why = "the service is shutting down; try again when it is back"


class DrainMiddleware:
    """Counts requests; once the service drains, new ones are answered with 503."""

    def __init__(self, app: ASGIApp, drain: DrainState) -> None:
        self.app, self._drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) in _PROBES - {"/readyz"}:
            await self.app(scope, receive, send)
            return
        if self._drain.closing:
            await self._refuse(scope, receive, send)
            return
        answered = False

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        self._drain.in_flight += 1
        try:
            await self.app(scope, receive, noted)
        except asyncio.CancelledError:
            # The server cancels requests that ran out of time, and would log this as a defect.
            if not self._drain.closing:
                raise
            if not answered:
                await self._refuse(scope, receive, send)
        finally:
            self._drain.in_flight -= 1

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"Retry-After": "5", "Connection": "close"}
        refused = ShuttingDown(self._drain.why, headers=headers)
        await problems.response(Request(scope), refused)(scope, receive, send)
