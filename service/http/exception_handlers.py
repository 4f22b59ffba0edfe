"""Every error as `application/problem+json` (RFC 9457), including FastAPI's own."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from service import errors
from service.auth.authorization import ROUTE_SCOPES
from service.errors import ServiceError
from service.http.problem import FieldProblem, Problem
from service.kit.device_loss import LOST, is_device_lost
from service.kit.memory import is_out_of_memory
from service.kit.urls import route_path

MEDIA_TYPE = "application/problem+json"


def install(app: FastAPI) -> None:
    """Register the handlers that turn every exception of a request into a problem document."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def catalogue() -> list[type[ServiceError]]:
    """All errors with a code of their own, by status and code."""
    return sorted(ServiceError.__subclasses__(), key=lambda kind: (kind.status, kind.code))


_TOLD = 5  # fields that the sentence names; `errors` has them all

# FastAPI's own errors, by their status.
_HTTP_ERRORS: Mapping[int, tuple[type[ServiceError], str]] = {
    404: (errors.RouteNotFound, "there is nothing at this path; /docs lists the routes"),
    405: (errors.MethodNotAllowed, "this path does not take that method; see /docs"),
}


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return response(request, error)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    fields = list(_field_problems(error.errors()))
    sentence = "; ".join(f"{field.name}: {field.detail}" for field in fields[:_TOLD])
    return response(request, errors.ParametersInvalid(sentence), fields)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind, detail = _HTTP_ERRORS.get(error.status_code, (ServiceError, str(error.detail)))
    problem = kind(detail, headers=dict(error.headers or {}))
    if kind is errors.MethodNotAllowed:
        problem.headers["Allow"] = ", ".join(_methods(route_path(request.scope)))
    if kind is ServiceError:
        problem.status, problem.code = error.status_code, "http_error"
        problem.title = "HTTP error"
    return response(request, problem)


def _methods(path: str) -> list[str]:
    """The methods that this path takes; FastAPI names only those of one of its routes."""
    methods = {method for method, route in ROUTE_SCOPES if route == path} or {
        method for method, route in ROUTE_SCOPES if _pattern(route).fullmatch(path)
    }
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _pattern(route: str) -> re.Pattern[str]:
    # A camera's id may hold slashes.
    return compile_path(route.replace("{camera_id}", "{camera_id:path}"))[0]


def shortage(error: BaseException) -> ServiceError | None:
    """The problem that an exception stands for where the host has no more of something.

    Its device is one of those. None for a defect of the code.
    """
    if is_device_lost(error):
        return errors.RuntimeUnavailable(LOST, headers={"Retry-After": "10"})
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    later = {"Retry-After": "5"}
    if is_out_of_memory(error):
        return errors.MemoryExhausted("the service is out of memory; try again", headers=later)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        what = "threads"
    elif isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        what = "open files"
    elif isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM):
        what = "processes or memory"
    else:
        return None
    return errors.RuntimeUnavailable(
        f"the host gives the service no more {what}; try again, or raise its limits", headers=later
    )


def unexpected(request: Request, error: Exception) -> JSONResponse:
    """The answer to an exception that nothing has handled; it says nothing about internals."""
    return response(
        request,
        shortage(error)
        or errors.InternalError("the service met a defect; its log has the details"),
    )


def problem_of(
    error: ServiceError, instance: str, fields: list[FieldProblem] | None = None
) -> Problem:
    """An error as an RFC 9457 document. instance: the path where it happened."""
    return Problem(
        type="about:blank",
        title=error.title,
        status=error.status,
        code=error.code,
        detail=error.detail,
        instance=instance,
        errors=fields or [],
    )


def response(
    request: Request, error: ServiceError, fields: list[FieldProblem] | None = None
) -> JSONResponse:
    """An error as the client gets it, counted in the metrics."""
    resources = getattr(request.state, "resources", None)
    if resources is not None:
        resources.metrics.rejections.labels(error.code).inc()
    return answer(error, request.url.path, fields)


def answer(
    error: ServiceError, instance: str, fields: list[FieldProblem] | None = None
) -> JSONResponse:
    """An error as the client gets it. instance: the path where it happened."""
    problem = problem_of(error, instance, fields)
    return JSONResponse(
        problem.model_dump(exclude=set() if fields else {"errors"}),
        status_code=error.status,
        headers=error.headers,
        media_type=MEDIA_TYPE,
    )


def _field_problems(raw: Iterable[Any]) -> Iterable[FieldProblem]:
    """Which fields are wrong and why; never their values, which may be personal data."""
    for error in raw:
        # loc is ("body" | "query" | "path" | "header", field, …)
        name = ".".join(str(part) for part in error["loc"][1:]) or str(error["loc"][0])
        if error["type"] == "extra_forbidden":
            detail = "there is no such parameter; see /docs"
        else:
            detail = str(error["msg"]).removeprefix("Value error, ")
        yield FieldProblem(name=name[:128], detail=detail)
