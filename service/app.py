"""create_app(): the HTTP service. Resources are opened in its lifespan and closed there."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from anyio import create_task_group, to_thread
from fastapi import Depends, FastAPI

from service.api import admin, backup, cameras, gallery, operate, page, query
from service.api.deps import unambiguous
from service.api.openapi import TITLE, openapi_document
from service.auth.authorization import authorise
from service.embedding.embedder import Backend
from service.http import exception_handlers as problems
from service.http.intake import Intake
from service.http.middleware import (
    CrossOrigin,
    DrainMiddleware,
    DrainState,
    RequestLogMiddleware,
    SecurityHeaders,
)
from service.http.overload import OverloadMiddleware
from service.kit.device_loss import report_loss
from service.observability.metrics import Metrics
from service.observability.tracing import Tracing
from service.pipeline.begun import Begun
from service.resources import State, open_resources
from service.settings import Settings


def create_app(
    settings: Settings, *, backend: Backend | None = None, started: Begun | None = None
) -> FastAPI:
    """The application for `settings`; nothing is opened before its lifespan starts.

    backend: what embeds, None for a network in this process. started: see `open_resources`.
    """

    metrics, tracing, drain = Metrics(), Tracing(settings.otlp_endpoint), DrainState()
    metrics.watch(
        "cmt_http_requests_in_flight", "Requests being worked on.", lambda: drain.in_flight
    )

    # From the first scrape on: a counter that appears with its first event seems not to have grown.
    metrics.requests.labels("GET", "/readyz", 503)
    for kind in problems.catalogue():
        metrics.rejections.labels(kind.code)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[State]:
        resources = open_resources(settings, metrics, tracing, backend, started)
        try:
            opened = await to_thread.run_sync(resources.__enter__)
        except Exception as error:
            app.state.failure = error  # `service.server` raises it: see `run`
            raise
        try:
            async with create_task_group() as group:
                group.start_soon(opened.pipeline.run)
                group.start_soon(opened.reembedder.follow)
                await opened.pipeline.self_check.first()
                # What was opened stays: spare the garbage collector from scanning it repeatedly.
                gc.collect()
                gc.freeze()
                yield State(resources=opened)
                group.cancel_scope.cancel()
        except Exception as error:
            if not report_loss(error):  # in background work
                raise
        finally:
            await to_thread.run_sync(partial(resources.__exit__, None, None, None))

    app = FastAPI(
        title=TITLE,
        version=version("cmt-reid"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(authorise), Depends(unambiguous)],
        # What generated clients call their functions.
        generate_unique_id_function=lambda route: route.name,
        # A slash too many is a 404, not a redirect that would send the body twice.
        redirect_slashes=False,
    )
    app.state.failure, app.state.drain = None, drain
    for module in (gallery, query, cameras, admin, backup, operate, page):
        app.include_router(module.router)
    problems.install(app)
    app.openapi = partial(openapi_document, app, keys=settings.api_keys_file is not None)  # type: ignore[method-assign]
    app.add_middleware(OverloadMiddleware)
    if settings.cors_origins:
        app.add_middleware(
            CrossOrigin,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Idempotency-Key"],
        )
    app.add_middleware(DrainMiddleware, drain=drain)
    app.add_middleware(Intake, trusted=settings.trusted_proxies, root_path=settings.root_path)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestLogMiddleware, metrics=metrics, tracing=tracing)
    return app
