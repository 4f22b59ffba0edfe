"""JSON bodies: read after the key is checked, bounded in size and time, parsed once.

FastAPI reads a body parameter before it runs any dependency, however long the body is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from service.api.fields import names_once
from service.api.schemas import form_errors
from service.api.uploads import bounded, in_time, is_utf8_of
from service.errors import BodyTimeout, BodyTooLarge, ContentTypeUnsupported

M = TypeVar("M", bound=BaseModel)

MAX_BYTES = 64 * 1024

# Errors that an endpoint may answer because of its JSON body.
JSON_ERRORS = (BodyTimeout, BodyTooLarge, ContentTypeUnsupported)


def json_of(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """A dependency that gives the body as `model`.

    It raises BodyTimeout, BodyTooLarge, ContentTypeUnsupported or RequestValidationError.
    """

    async def read(request: Request) -> M:
        async with in_time(request):
            body = b"".join([chunk async for chunk in bounded(request, MAX_BYTES)])
        if body and not is_utf8_of(request, b"application/json"):
            raise ContentTypeUnsupported("send the body as application/json, in UTF-8")
        try:
            found = model.model_validate_json(body)
        except ValidationError as error:
            raise RequestValidationError(form_errors(error)) from error
        try:
            names_once(body)
        except ValueError as error:
            wrong = {"type": "repeated", "loc": ("body",), "msg": str(error)}
            raise RequestValidationError([wrong]) from error
        return found

    return read


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of an endpoint whose body `json_of` reads."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
