"""For administrators: embed the gallery again, drop old features, read the audit log."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query

from service import errors
from service.api.deps import NO_QUERY, ActorDep, ResourcesDep
from service.api.json_body import JSON_ERRORS, json_body, json_of
from service.api.openapi import documented
from service.api.schemas import (
    AuditParameters,
    AuditRecord,
    AuditRecords,
    ModelVersionRecord,
    ModelVersions,
    ReembedRequest,
    ReembedStatus,
)
from service.gallery import Act

router = APIRouter(prefix="/admin", tags=["admin"])


@router.post(
    "/reembed",
    status_code=202,
    dependencies=[NO_QUERY],
    openapi_extra=json_body(ReembedRequest),
    responses=documented(*JSON_ERRORS, errors.ModelVersionConflict, errors.CheckpointUnusable),
)
async def reembed(
    wanted: Annotated[ReembedRequest, Depends(json_of(ReembedRequest))],
    state: ResourcesDep,
    actor: ActorDep,
) -> ReembedStatus:
    """Embed every item with another checkpoint, then search with that one; in the background.

    Until it is done, all goes on with the features there are. GET /admin/reembed says how far it
    is. Start the service with the new checkpoint from then on.
    """
    status = await state.reembedder.start(wanted.checkpoint, actor)
    return ReembedStatus.model_validate(status, from_attributes=True)


@router.get("/reembed", dependencies=[NO_QUERY], responses=documented())
async def reembed_status(state: ResourcesDep) -> ReembedStatus:
    """How far embedding the gallery again is."""
    status = await state.reembedder.current()
    return ReembedStatus.model_validate(status, from_attributes=True)


@router.get("/versions", dependencies=[NO_QUERY], responses=documented())
async def list_versions(state: ResourcesDep) -> ModelVersions:
    """The checkpoints whose features the gallery holds, oldest first."""
    versions = await state.pipeline.stored(lambda: state.gallery.versions)
    return ModelVersions(versions=[ModelVersionRecord.model_validate(one) for one in versions])


@router.delete(
    "/versions/{fingerprint}",
    status_code=204,
    dependencies=[NO_QUERY],
    responses=documented(
        errors.ModelVersionUnknown,
        errors.ModelVersionConflict,
        errors.StorageUnwritable,
        errors.StorageFull,
    ),
)
async def drop_version(
    fingerprint: Annotated[str, Path(description="As GET /admin/versions lists it.")],
    state: ResourcesDep,
    actor: ActorDep,
) -> None:
    """Remove a checkpoint's features, which frees their space; items and crops stay.

    The one in use, and one that the gallery is being embedded with, cannot go: 409.
    """
    await state.pipeline.stored(partial(state.gallery.drop_version, fingerprint, actor=actor))


@router.get("/audit", responses=documented(errors.CursorInvalid))
async def audit(
    parameters: Annotated[AuditParameters, Query()], state: ResourcesDep, actor: ActorDep
) -> AuditRecords:
    """Who did what, newest first. Persons appear under pseudonyms."""
    state.pipeline.refusals.write()
    await state.pipeline.audit_writer.flush()
    read = partial(state.gallery.audit, parameters.limit, parameters.cursor)
    page = await state.pipeline.stored(read)
    await state.pipeline.audit_writer.note(Act(actor, "audit"))
    return AuditRecords(
        entries=[AuditRecord.model_validate(entry) for entry in page.entries],
        next_cursor=page.next_cursor,
    )
