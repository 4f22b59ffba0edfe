"""Enroll crops, look at them, erase them."""

from __future__ import annotations

from functools import partial
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query, Request, Response

from service import errors
from service.api.conditional import not_modified
from service.api.deps import NO_QUERY, ActorDep, ResourcesDep, json_response
from service.api.json_body import JSON_ERRORS, json_body, json_of
from service.api.labels import meant
from service.api.openapi import IMAGE_PART, documented, form_body, images_part
from service.api.schemas import (
    BATCH_IMAGES,
    KEY_PATTERN,
    BatchAnswer,
    BatchForm,
    BatchItem,
    BatchResult,
    EnrollForm,
    Erased,
    EraseParameters,
    GalleryItem,
    GalleryPage,
    ImageParameters,
    ItemPatch,
    ListParameters,
)
from service.api.uploads import (
    IMAGE_ERRORS,
    UPLOAD_ERRORS,
    RequestTimeout,
    check_image_count,
    invalid_field,
    read_upload,
)
from service.gallery import Act, Filters, ItemUpdate
from service.http.exception_handlers import problem_of
from service.images.decode import Box
from service.kit.urls import route_path
from service.pipeline import enrollment
from service.pipeline.enrollment import Enrollment, Labels, Outcome
from service.pipeline.thumbnails import thumbnail
from service.resources import Resources

router = APIRouter(prefix="/gallery", tags=["gallery"])

_CACHED = (
    "private, no-cache"  # of a picture: kept by a browser, and asked for again before it is shown
)
_PENDING = (
    "Erased, so that nothing finds it any more; the object storage does not answer, and deletes "
    "the picture once it does."
)
_ITEMS_BYTES = BATCH_IMAGES * 16 * 1024  # 8 KB of metadata and the other fields of each image

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=KEY_PATTERN,
        description="Makes a repeat of this enrollment harmless.",
    ),
]


async def _canonical(
    request: Request,
    item_id: Annotated[str, Path(alias="id", json_schema_extra={"format": "uuid"})],
) -> str:
    """The id as it is stored. Raises ItemNotFound where it is no UUID."""
    if route_path(request.scope) == "/gallery/batch":  # a route that takes another method
        raise HTTPException(405)
    try:
        return str(UUID(item_id))
    except ValueError as error:
        raise errors.ItemNotFound(
            "no item has this id, which is no UUID; GET /gallery lists the items"
        ) from error


ItemId = Annotated[str, Depends(_canonical)]


@router.post(
    "",
    status_code=201,
    response_model=GalleryItem,
    dependencies=[NO_QUERY],
    openapi_extra=form_body(EnrollForm, IMAGE_PART),
    responses={
        200: {"model": GalleryItem, "description": "The item that this key enrolled before."},
        **documented(
            *UPLOAD_ERRORS,
            *IMAGE_ERRORS,
            errors.IdempotencyConflict,
            errors.StorageUnwritable,
            errors.StorageFull,
            errors.GalleryFull,
            errors.IndexOutOfStep,
            errors.CropsUnavailable,
        ),
    },
)
async def enroll(
    request: Request,
    state: ResourcesDep,
    actor: ActorDep,
    idempotency_key: IdempotencyKey = None,
    request_timeout: RequestTimeout = None,
) -> Response:
    """Enroll one crop. A 201 means durable: the next query can return the item.

    A repeat with the same Idempotency-Key and content gives the stored item with 200; with other
    content 409. A key lives as long as its item.
    """
    async with read_upload(request, max_images=1, within=request_timeout) as upload:
        form = upload.parse(EnrollForm)
        check_image_count(upload.images, most=1)
        [image] = upload.whole()
        wanted = enrollment_of(image, form, idempotency_key)
        [outcome] = await enrollment.enroll(state.pipeline, [wanted], actor)
    if isinstance(outcome, errors.ServiceError):
        raise outcome
    item = GalleryItem.model_validate(outcome.item)
    location = f"{request.scope['root_path']}/gallery/{item.id}"
    return json_response(item, 201 if outcome.new else 200, Location=location)


@router.post(
    "/batch",
    response_model=BatchAnswer,
    dependencies=[NO_QUERY],
    openapi_extra=form_body(BatchForm, images_part(BATCH_IMAGES, "Crops, each of its own.")),
    responses=documented(
        *UPLOAD_ERRORS,
        errors.StorageUnwritable,
        errors.StorageFull,
        errors.GalleryFull,
        errors.IndexOutOfStep,
        errors.CropsUnavailable,
    ),
)
async def enroll_batch(
    request: Request,
    state: ResourcesDep,
    actor: ActorDep,
    request_timeout: RequestTimeout = None,
) -> Response:
    """Enroll up to 256 crops in one transaction, each with a result of its own, in order.

    A bad image fails alone. Once this is answered, all items with 201 or 200 are durable.
    """
    most = state.settings.max_batch_bytes
    async with read_upload(
        request,
        BATCH_IMAGES,
        max_bytes=most,
        max_field_bytes=_ITEMS_BYTES,
        within=request_timeout,
    ) as upload:
        form = upload.parse(BatchForm)
        check_image_count(upload.images, most=BATCH_IMAGES)
        items = form.items or [BatchItem() for _ in upload.images]
        if len(items) != len(upload.images):
            raise invalid_field(
                "items", f"has {len(items)} objects for {len(upload.images)} images; give one each"
            )
        pairs = enumerate(zip(upload.images, items, strict=True))
        wanted = {
            place: enrollment_of(image, item, item.key)
            for place, (image, item) in pairs
            if place not in upload.refused
        }
        enrolled = await enrollment.enroll(state.pipeline, list(wanted.values()), actor)
    outcomes: dict[int, Outcome] = {**upload.refused, **dict(zip(wanted, enrolled, strict=True))}
    return json_response(
        BatchAnswer(
            results=[
                _result(outcomes[place], f"{request.url.path}#{place}", state)
                for place in range(len(items))
            ]
        )
    )


def enrollment_of(image: bytes, form: EnrollForm | BatchItem, key: str | None) -> Enrollment:
    """What is to be enrolled of an image with these fields."""
    return Enrollment(
        image,
        None if form.box is None else Box(*form.box),
        form.modality,
        form.polarity,
        Labels(form.person_id, form.camera_id, form.captured_at, form.metadata),
        key,
    )


def _result(outcome: Outcome, instance: str, state: Resources) -> BatchResult:
    if isinstance(outcome, errors.ServiceError):
        state.metrics.rejections.labels(outcome.code).inc()
        return BatchResult(status=outcome.status, problem=problem_of(outcome, instance))
    return BatchResult(
        status=201 if outcome.new else 200, item=GalleryItem.model_validate(outcome.item)
    )


@router.get("", response_model=GalleryPage, responses=documented(errors.CursorInvalid))
async def list_items(
    parameters: Annotated[ListParameters, Query()], state: ResourcesDep, actor: ActorDep
) -> GalleryPage:
    """List items in the order of enrollment, filtered, page by page."""
    filters = Filters(
        **await meant(
            state, "query", person_id=parameters.person_id, camera_id=parameters.camera_id
        ),
        gallery_modality=tuple(parameters.modality),
        captured_from=parameters.captured_from,
        captured_to=parameters.captured_to,
    )
    page = await state.pipeline.stored(
        partial(state.gallery.list, filters, parameters.limit, parameters.cursor)
    )
    details = {"items": len(page.items), **filters.described()}
    await state.pipeline.audit_writer.note(Act(actor, "list", None, details, filters.person_id))
    return GalleryPage(
        items=[GalleryItem.model_validate(item) for item in page.items],
        next_cursor=page.next_cursor,
        total=page.total,
    )


@router.delete(
    "",
    response_model=Erased,
    responses={
        202: {"model": Erased, "description": _PENDING},
        **documented(errors.StorageUnwritable, errors.StorageFull),
    },
)
async def erase_person(
    parameters: Annotated[EraseParameters, Query()], state: ResourcesDep, actor: ActorDep
) -> Response:
    """Erase a person: rows, crops, features and index entries of every item with this label."""
    labels = await meant(state, "query", person_id=[parameters.person_id])
    erase = partial(state.gallery.erase, *labels["person_id"], actor=actor)
    erased = await state.pipeline.with_crops(erase)
    return _erased(erased.items, erased.pending) or json_response(Erased(deleted=erased.items))


@router.get(
    "/{id}",
    response_model=GalleryItem,
    dependencies=[NO_QUERY],
    responses=documented(errors.ItemNotFound),
)
async def get_item(item_id: ItemId, state: ResourcesDep) -> GalleryItem:
    """One item."""
    item = await state.pipeline.stored(partial(state.gallery.get, item_id))
    return GalleryItem.model_validate(item)


@router.get(
    "/{id}/image",
    response_class=Response,
    responses={
        **documented(
            errors.ItemNotFound,
            errors.MemoryExhausted,
            errors.RuntimeUnavailable,
            errors.CropsUnavailable,
            errors.GalleryDamaged,
        ),
        200: {
            "description": "The stored crop: the upload without metadata, or the box as PNG; with "
            "`height` a JPEG thumbnail. It has an ETag: whoever keeps it asks whether the item is "
            "still there before showing it again.",
            "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
        },
        304: {"description": "The picture of the ETag in If-None-Match, unchanged."},
    },
)
async def get_image(
    item_id: ItemId,
    parameters: Annotated[ImageParameters, Query()],
    request: Request,
    state: ResourcesDep,
    actor: ActorDep,
) -> Response:
    """The stored crop of one item, or a thumbnail of it."""
    item = await state.pipeline.stored(partial(state.gallery.get, item_id))
    await state.pipeline.audit_writer.note(Act(actor, "image", item_id))
    # An item's crop never changes, but it may be erased: then no cache may show it any more.
    height = parameters.height
    tag = f'W/"{item.sha256}{"" if height is None else f"-{height}"}"'
    headers = {"ETag": tag, "Cache-Control": _CACHED, "Vary": "Authorization"}
    if not_modified(request, tag):
        return Response(status_code=304, headers=headers)
    data, media_type = await state.pipeline.with_crops(partial(state.gallery.image, item_id))
    if height is not None:
        data = await thumbnail(state.pipeline, item, data, height, actor)
        media_type = "image/jpeg"
    return Response(data, media_type=media_type, headers=headers)


@router.patch(
    "/{id}",
    response_model=GalleryItem,
    dependencies=[NO_QUERY],
    openapi_extra=json_body(ItemPatch),
    responses=documented(
        *JSON_ERRORS, errors.ItemNotFound, errors.StorageUnwritable, errors.StorageFull
    ),
)
async def update_item(
    item_id: ItemId,
    patch: Annotated[ItemPatch, Depends(json_of(ItemPatch))],
    state: ResourcesDep,
    actor: ActorDep,
) -> GalleryItem:
    """Change an item's labels or metadata: what is given; null empties a field.

    Once this is answered, queries filter by the new labels.
    """
    changed = ItemUpdate(**patch.model_dump(include=patch.model_fields_set))
    update = partial(state.gallery.update, item_id, changed, actor=actor)
    return GalleryItem.model_validate(await state.pipeline.stored(update))


@router.delete(
    "/{id}",
    status_code=204,
    dependencies=[NO_QUERY],
    responses={
        202: {"model": Erased, "description": _PENDING},
        **documented(errors.ItemNotFound, errors.StorageUnwritable, errors.StorageFull),
    },
)
async def delete_item(item_id: ItemId, state: ResourcesDep, actor: ActorDep) -> Response:
    """Delete one item. Once this is answered, no query returns it."""
    delete = partial(state.gallery.delete, item_id, actor=actor)
    pending = await state.pipeline.with_crops(delete)
    return _erased(1, pending) or Response(status_code=204)


def _erased(items: int, pending: int) -> Response | None:
    """The answer to an erasure that the object storage has not carried out yet."""
    return json_response(Erased(deleted=items, pending=pending), 202) if pending else None
