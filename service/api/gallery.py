"""Enroll crops, look at them, erase them."""

from __future__ import annotations

from functools import partial
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query, Request, Response

from service import errors
from service.api.deps import (
    NO_QUERY,
    UPLOAD_ERRORS,
    ResourcesDep,
    check_image_count,
    form_body,
    read_upload,
)
from service.api.schemas import (
    EnrollForm,
    Erased,
    EraseParameters,
    GalleryItem,
    GalleryPage,
    ListParameters,
)
from service.gallery import Filters
from service.images import Box
from service.pipeline import Labels, Picture
from service.problems import documented

router = APIRouter(prefix="/gallery", tags=["gallery"])

IMAGE_ERRORS = (
    errors.ImageEmpty,
    errors.ImageMultiFrame,
    errors.ImageTooLarge,
    errors.ImageTooSmall,
    errors.ImageTruncated,
    errors.ImageTypeUnsupported,
    errors.ImageUndecodable,
    errors.BoxOutside,
)
IMAGE_PART = {
    "type": "string",
    "format": "binary",
    "description": "JPEG, PNG, WebP, BMP or TIFF, 8- or 16-bit: a person crop.",
}

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Makes a repeat of this enrollment harmless.",
    ),
]
ItemId = Annotated[str, Path(alias="id", json_schema_extra={"format": "uuid"})]


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
            errors.Overloaded,
            errors.StorageUnwritable,
            errors.StorageFull,
        ),
    },
)
async def enroll(
    request: Request,
    response: Response,
    state: ResourcesDep,
    idempotency_key: IdempotencyKey = None,
) -> GalleryItem:
    """Enroll one crop. A 201 means durable: the next query can return the item.

    A repeat with the same Idempotency-Key and content gives the stored item with 200; with other
    content 409. A key lives as long as its item.
    """
    async with read_upload(request, max_images=1) as upload:
        form = upload.parse(EnrollForm)
        check_image_count(upload.images, most=1)
        item, new = await state.pipeline.enroll(
            Picture(upload.images[0], form.modality, None if form.box is None else Box(*form.box)),
            Labels(form.person_id, form.camera_id, form.captured_at, form.metadata),
            idempotency_key,
        )
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"/gallery/{item.id}"
    return GalleryItem.model_validate(item)


@router.get("", response_model=GalleryPage, responses=documented(errors.CursorInvalid))
async def list_items(
    parameters: Annotated[ListParameters, Query()], state: ResourcesDep
) -> GalleryPage:
    """List items in the order of enrollment, filtered, page by page."""
    filters = Filters(
        person_id=tuple(parameters.person_id),
        camera_id=tuple(parameters.camera_id),
        gallery_modality=tuple(parameters.modality),
        captured_from=parameters.captured_from,
        captured_to=parameters.captured_to,
    )
    page = await state.pipeline.stored(
        partial(state.gallery.list, filters, parameters.limit, parameters.cursor)
    )
    return GalleryPage(
        items=[GalleryItem.model_validate(item) for item in page.items],
        next_cursor=page.next_cursor,
        total=page.total,
    )


@router.delete(
    "",
    response_model=Erased,
    responses=documented(errors.StorageUnwritable, errors.StorageFull),
)
async def erase_person(
    parameters: Annotated[EraseParameters, Query()], state: ResourcesDep
) -> Erased:
    """Erase a person: rows, crops, features and index entries of every item with this label."""
    deleted = await state.pipeline.stored(partial(state.gallery.delete_where, parameters.person_id))
    return Erased(deleted=deleted)


@router.get(
    "/{id}",
    response_model=GalleryItem,
    dependencies=[NO_QUERY],
    responses=documented(errors.ItemNotFound),
)
async def get_item(item_id: ItemId, state: ResourcesDep) -> GalleryItem:
    """One item."""
    item = await state.pipeline.stored(partial(state.gallery.get, _canonical(item_id)))
    return GalleryItem.model_validate(item)


@router.get(
    "/{id}/image",
    response_class=Response,
    dependencies=[NO_QUERY],
    responses={
        **documented(errors.ItemNotFound),
        200: {
            "description": "The stored crop, as it was uploaded; a PNG where a box was given.",
            "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
        },
    },
)
async def get_image(item_id: ItemId, state: ResourcesDep) -> Response:
    """The stored crop of one item."""
    data, media_type = await state.pipeline.stored(
        partial(state.gallery.image, _canonical(item_id))
    )
    return Response(data, media_type=media_type)


@router.delete(
    "/{id}",
    status_code=204,
    dependencies=[NO_QUERY],
    responses=documented(errors.ItemNotFound, errors.StorageUnwritable, errors.StorageFull),
)
async def delete_item(item_id: ItemId, state: ResourcesDep) -> None:
    """Delete one item. Once this is answered, no query returns it."""
    await state.pipeline.stored(partial(state.gallery.delete, _canonical(item_id)))


def _canonical(item_id: str) -> str:
    """The id as it is stored. What is no UUID is the id of no item. Raises ItemNotFound."""
    try:
        return str(UUID(item_id))
    except ValueError as error:
        raise errors.ItemNotFound(
            "no item has this id, which is no UUID; GET /gallery lists the items"
        ) from error
