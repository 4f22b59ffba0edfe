"""JSON bodies: read after the key is known, bounded in size and time, parsed once.

The framework reads a body parameter before anything else of a request, however long it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from service.api.schemas import form_errors
from service.api.uploads import bounded, in_time, is_utf8_of
from service.errors import BodyTimeout, BodyTooLarge, ContentTypeUnsupported

M = TypeVar("M", bound=BaseModel)

MAX_BYTES = 64 * 1024

# What an endpoint with a JSON body may answer because of it.
JSON_ERRORS = (BodyTimeout, BodyTooLarge, ContentTypeUnsupported)


def json_of(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """A dependency: the body as `model`. Raises ServiceError or RequestValidationError."""

    async def read(request: Request) -> M:
        with in_time(request):
            body = b"".join([chunk async for chunk in bounded(request, MAX_BYTES)])
        if body and not is_utf8_of(request, b"application/json"):
            raise ContentTypeUnsupported("send the body as application/json, in UTF-8")
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            raise RequestValidationError(form_errors(error)) from error

    return read


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of an endpoint with such a body."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
