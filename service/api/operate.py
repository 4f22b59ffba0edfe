"""Probes, the model card, and the documentation page with its assets."""

from __future__ import annotations

import asyncio
import logging
from importlib.resources import files

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from service import errors
from service.api.deps import NO_QUERY, ResourcesDep
from service.api.openapi import documented
from service.api.schemas import Health, MatchCutoffs, ModelCard, Readiness
from service.observability.metrics import CONTENT_TYPE_LATEST

log = logging.getLogger(__name__)

_PATIENCE = 3.5  # seconds that a check may take before it is asked why

router = APIRouter(tags=["operate"])

# Swagger UI as the package fastapi-offline ships it; only its files are used.
_SWAGGER = files("fastapi_offline") / "static"
_WEB = files("service") / "web"
_ASSETS = {
    "swagger-ui.css": (_SWAGGER, "text/css"),
    "swagger-ui-bundle.js": (_SWAGGER, "text/javascript"),
    "docs.js": (_WEB, "text/javascript"),
}


@router.get("/livez", dependencies=[NO_QUERY])
async def livez() -> Health:
    """The process answers."""
    return Health()


@router.get(
    "/readyz",
    response_model_exclude_none=True,
    dependencies=[NO_QUERY],
    responses=documented(
        errors.NotReady,
        errors.IndexOutOfStep,
        errors.ModelVersionConflict,
        errors.StorageUnwritable,
        errors.GalleryDamaged,
        errors.MemoryExhausted,
        errors.ShardsMissing,
    ),
)
async def readyz(state: ResourcesDep) -> Readiness:
    """Images are embedded, index in step, disk writable, keys readable; 503 names what is not.

    An object storage of crops that does not answer is named with 200, because searches go on, and
    so are items that a GPU's memory does not hold.
    """
    state.keyring.check()
    state.pipeline.self_check.check()
    state.gallery.refuse_stale()
    checking = asyncio.ensure_future(state.pipeline.stored(state.gallery.check))
    # One that is given up below fails later, which nobody asks for any more: no defect to log.
    checking.add_done_callback(lambda done: done.cancelled() or done.exception())
    if not (await asyncio.wait({checking}, timeout=_PATIENCE))[0]:
        state.gallery.refuse_stale()  # it waits for a database that has stopped to answer
    try:
        await checking
    except (errors.StorageUnwritable, errors.DatabaseUnavailable) as error:
        log.warning("not ready: %s", error.detail)  # its paths and hosts are not for clients
        failing = (
            "the data folder or the database cannot be written"
            if isinstance(error, errors.StorageUnwritable)
            else "the database does not answer"
        )
        raise type(error)(f"{failing}; the service's log has the details") from error
    available = state.gallery.crops_available
    return Readiness(
        crops=None if available is None else "ok" if available else "unavailable",
        items_on_host=state.gallery.spilled or None,
        lag_seconds=None if state.gallery.replicas is None else round(state.gallery.lag, 3),
    )


@router.get(
    "/metrics",
    dependencies=[NO_QUERY],
    response_class=Response,
    responses={
        **documented(),
        200: {"description": "The text format of Prometheus.", "content": {"text/plain": {}}},
    },
)
async def metrics(state: ResourcesDep) -> Response:
    """Requests, stages, batches, refusals and sizes, for Prometheus."""
    return Response(state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/model", dependencies=[NO_QUERY], responses=documented())
async def model_card(state: ResourcesDep) -> ModelCard:
    """The checkpoint and how it runs here."""
    embedder = state.pipeline.engine.embedder
    info = embedder.info
    return ModelCard(
        fingerprint=info.fingerprint,
        metric=info.config.metric,
        config=info.config.model_dump(),
        calibration=None if info.calibration is None else info.calibration.summary(),
        match=MatchCutoffs(likely=state.settings.match_likely, none=state.settings.match_none),
        prior=state.settings.prior,
        device=embedder.device,
        runtime=embedder.runtime,
        precision=embedder.precision,
    )


@router.get("/docs", include_in_schema=False)
def docs() -> HTMLResponse:
    """Swagger UI over /openapi.json, without a file from elsewhere."""
    return HTMLResponse((_WEB / "docs.html").read_text())


@router.get("/docs/{asset}", include_in_schema=False)
def docs_asset(asset: str) -> Response:
    """A file of the documentation page."""
    if asset not in _ASSETS:
        raise errors.RouteNotFound("the documentation page has no such file; open /docs")
    folder, media_type = _ASSETS[asset]
    return Response((folder / asset).read_bytes(), media_type=media_type)
