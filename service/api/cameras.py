"""What holds for a camera's pictures where their sender does not say it."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Path
from fastapi.exceptions import RequestValidationError

from model.labels import MAX_LABEL, LabelError, normalized_label
from service import errors
from service.api.deps import NO_QUERY, ActorDep, ResourcesDep
from service.api.json_body import JSON_ERRORS, json_body, json_of
from service.api.openapi import documented
from service.api.schemas import CameraDefaults, CameraRecord, CameraRecords
from service.gallery import Camera

router = APIRouter(prefix="/cameras", tags=["cameras"], dependencies=[NO_QUERY])

# A label may hold any character, a slash too, whether or not it came percent-encoded.
_ONE = "/{camera_id:path}"
_PATH_ERRORS = (errors.RouteNotFound,)  # an empty id, or one of two lines


async def _label(
    camera_id: Annotated[str, Path(json_schema_extra={"minLength": 1, "maxLength": MAX_LABEL})],
) -> str:
    """The id as it is stored. Raises RequestValidationError where it is no label."""
    if not camera_id:  # a slash too many
        raise HTTPException(404)
    try:
        return normalized_label(camera_id)
    except LabelError as error:
        raise RequestValidationError(
            [{"type": "value_error", "loc": ("path", "camera_id"), "msg": str(error)}]
        ) from error


CameraId = Annotated[str, Depends(_label)]


@router.get("", response_model=CameraRecords, responses=documented())
async def list_cameras(state: ResourcesDep) -> CameraRecords:
    """The cameras that have defaults, by id."""
    cameras = await state.pipeline.stored(state.gallery.cameras)
    return CameraRecords(cameras=[CameraRecord.model_validate(camera) for camera in cameras])


@router.get(
    _ONE, response_model=CameraRecord, responses=documented(*_PATH_ERRORS, errors.CameraNotFound)
)
async def get_camera(camera_id: CameraId, state: ResourcesDep) -> CameraRecord:
    """One camera's defaults."""
    found = await state.pipeline.stored(partial(state.gallery.find_cameras, [camera_id]))
    if camera_id not in found:
        raise _unknown()
    return CameraRecord.model_validate(found[camera_id])


@router.put(
    _ONE,
    response_model=CameraRecord,
    openapi_extra=json_body(CameraDefaults),
    responses=documented(*_PATH_ERRORS, *JSON_ERRORS, errors.StorageUnwritable, errors.StorageFull),
)
async def put_camera(
    camera_id: CameraId,
    defaults: Annotated[CameraDefaults, Depends(json_of(CameraDefaults))],
    state: ResourcesDep,
    actor: ActorDep,
) -> CameraRecord:
    """Set a camera's defaults, in place of those it had.

    They hold from the next enrollment with this `camera_id` and the next query with this
    `query_camera_id` on, in every replica; what is enrolled already stays as it is.
    """
    camera = Camera(camera_id, defaults.modality, defaults.polarity)
    put = partial(state.gallery.put_camera, camera, actor=actor)
    return CameraRecord.model_validate(await state.pipeline.stored(put))


@router.delete(
    _ONE,
    status_code=204,
    responses=documented(
        *_PATH_ERRORS, errors.CameraNotFound, errors.StorageUnwritable, errors.StorageFull
    ),
)
async def delete_camera(camera_id: CameraId, state: ResourcesDep, actor: ActorDep) -> None:
    """Forget a camera's defaults. Its items stay, and its next pictures are as they look."""
    delete = partial(state.gallery.delete_camera, camera_id, actor=actor)
    if not await state.pipeline.stored(delete):
        raise _unknown()


def _unknown() -> errors.CameraNotFound:
    return errors.CameraNotFound("no defaults are stored for this camera; GET /cameras lists them")
