"""What endpoints share: the process's resources, the caller's name, and answers as JSON."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

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


async def no_query_parameters(request: Request) -> None:
    """Refuse a query string where the route takes none: a misspelt filter must not pass.

    Raises RequestValidationError.
    """
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
