"""What endpoints share: the process's resources, the caller's name, and answers as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, cast, get_origin
from urllib.parse import parse_qsl, unquote_to_bytes

from fastapi import Depends, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from service.kit.text import is_utf_8
from service.resources import Resources


async def actor(request: Request) -> str:
    """The caller, for the audit log, as `authorise` identified it."""
    return cast(str, request.state.actor)


ActorDep = Annotated[str, Depends(actor)]


def resources(request: Request) -> Resources:
    """The resources that the application's lifespan opened."""
    return cast(Resources, request.state.resources)


# Dependencies are coroutines, which run on the event loop; FastAPI runs others in a thread.
async def _resources(request: Request) -> Resources:
    return resources(request)


ResourcesDep = Annotated[Resources, Depends(_resources)]


async def unambiguous(request: Request) -> None:
    """Refuse what would be read otherwise than it was meant.

    The framework takes the last of a parameter's values and the first of a header's, and bytes
    that are no UTF-8 become U+FFFD, which is another label. Raises RequestValidationError.
    """
    dependant = request.scope["route"].dependant
    errors = []
    try:
        unquote_to_bytes(request.scope["raw_path"]).decode()
    except UnicodeDecodeError:
        errors.append(_invalid("path", "path", "must be UTF-8"))
    if query := request.scope["query_string"]:
        errors += _ambiguous(query.decode("latin-1"), dependant)
    sent = [name for name, _ in request.scope["headers"]]
    errors += [
        _invalid("header", name, "must be given once")
        for name in ("Content-Type", *(field.alias for field in dependant.header_params))
        if sent.count(name.lower().encode()) > 1
    ]
    if errors:
        raise RequestValidationError(errors)


def _ambiguous(query: str, dependant: Dependant) -> Iterator[dict[str, Any]]:
    given = parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
    for name, count in Counter(name for name, _ in given).items():
        if not is_utf_8(name) or not all(is_utf_8(text) for key, text in given if key == name):
            shown = name.encode(errors="replace").decode()
            yield _invalid("query", shown, "must be UTF-8")
        elif count > 1 and name not in _repeatable(dependant):
            yield _invalid("query", name, "must be given once")


def _repeatable(dependant: Dependant) -> set[str]:
    """The query parameters of an endpoint that may be given several times."""
    names = set()
    for parameter in dependant.query_params:
        kind = parameter.field_info.annotation
        fields = {parameter.alias: parameter.field_info}
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = dict(kind.model_fields)
        names |= {name for name, field in fields.items() if get_origin(field.annotation) is list}
    return names


def _invalid(place: str, name: str, message: str) -> dict[str, Any]:
    return {"type": "value_error", "loc": (place, name), "msg": message}


async def no_query_parameters(request: Request) -> None:
    """Refuse a query string where the route takes none: a misspelt filter must not pass.

    Raises RequestValidationError.
    """
    if not request.scope["query_string"]:  # without it there is nothing to take apart
        return
    names = sorted(set(request.query_params))
    if names:
        raise RequestValidationError(
            [{"type": "extra_forbidden", "loc": ("query", name), "msg": ""} for name in names]
        )


NO_QUERY = Depends(no_query_parameters)


def json_response(body: BaseModel, status: int = 200, **headers: str) -> Response:
    """A model as JSON, without the fields that were not set.

    FastAPI would validate a returned model a second time.
    """
    return Response(
        body.model_dump_json(exclude_unset=True),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )
