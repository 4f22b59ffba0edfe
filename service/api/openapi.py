"""The OpenAPI document: what FastAPI cannot derive about forms, errors and scopes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service import errors
from service.api.schemas import BatchForm, FormModel
from service.auth.authorization import ROUTE_SCOPES
from service.errors import ServiceError
from service.http import exception_handlers as problems
from service.http.exception_handlers import MEDIA_TYPE
from service.http.problem import Problem

TITLE = "CMT re-identification"

_INTRODUCTION = """Enroll person crops from visible and infrared cameras, then find a person seen
by one kind of camera among crops from the other.

Every error is `application/problem+json` (RFC 9457) with a stable `code`."""

REFERENCE = "#/components/schemas/{model}"
IMAGE_PART = {
    "type": "string",
    "format": "binary",
    "description": "JPEG, PNG, WebP, BMP or TIFF, 8- or 16-bit: a person crop.",
}

# Errors that every endpoint may answer.
_EVERYWHERE: tuple[type[ServiceError], ...] = (
    errors.Unauthorized,
    errors.OriginRefused,
    errors.ScopeMissing,
    errors.ParametersInvalid,
    errors.InternalError,
    errors.RateLimited,
    errors.ShuttingDown,
    errors.KeysUnreadable,
    errors.DatabaseUnavailable,
    errors.StorageMoved,
    errors.ClockWrong,
)


def openapi_document(app: FastAPI, keys: bool) -> dict[str, Any]:
    """The OpenAPI document. keys: whether routes that are not open need an API key."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=_description(),
            routes=app.routes,
        )
        components = document["components"]["schemas"]
        schema = Problem.model_json_schema(ref_template=REFERENCE)
        components |= {**schema.pop("$defs"), "Problem": schema}
        components |= BatchForm.model_json_schema(ref_template=REFERENCE)["$defs"]
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if not keys or ROUTE_SCOPES[method.upper(), path] is None:
                    del operation["security"]
        app.openapi_schema = document
    return app.openapi_schema


def _description() -> str:
    routes = "\n".join(
        f"| `{method} {path}` | {scope or 'open'} |"
        for (method, path), scope in ROUTE_SCOPES.items()
    )
    codes = "\n".join(
        f"| {kind.status} | `{kind.code}` | {(kind.__doc__ or '').splitlines()[0]} |"
        for kind in problems.catalogue()
    )
    return (
        f"{_INTRODUCTION}\n\n### Scopes\n\n| route | scope |\n|---|---|\n{routes}\n\n"
        f"### Codes\n\n| status | code | meaning |\n|---|---|---|\n{codes}\n"
    )


def documented(*kinds: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` of an endpoint that may raise `kinds`, and what all may raise."""
    every: set[type[ServiceError]] = {*kinds, *_EVERYWHERE}
    responses: dict[int | str, dict[str, Any]] = {}
    for status in sorted({kind.status for kind in every}):
        codes = sorted(kind.code for kind in every if kind.status == status)
        responses[status] = {
            "description": "Code " + " or ".join(f"`{code}`" for code in codes),
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    return responses


def images_part(most: int, description: str) -> dict[str, Any]:
    """The schema of a form's part `image` that may be repeated."""
    return {
        "type": "array",
        "items": IMAGE_PART,
        "minItems": 1,
        "maxItems": most,
        "description": description,
    }


def form_body(model: type[FormModel], image: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of an endpoint that reads its own form: `model`'s fields and the images."""
    schema = model.model_json_schema(ref_template=REFERENCE)
    schema.pop("$defs", None)  # `openapi_document` puts them where REFERENCE points to
    fields = {name: _form_field(field) for name, field in schema["properties"].items()}
    schema["properties"] = {"image": image, **fields}
    schema["required"] = ["image"]
    schema["title"] = model.__name__
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


def _form_field(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field in a form, which has no null: an empty text stands for it.

    That is the default where it is a value of the kind; generators of clients refuse any other.
    """
    if "anyOf" in schema:
        kind = next(kind for kind in schema.pop("anyOf") if kind != {"type": "null"})
        schema = {**kind, **schema}
        del schema["default"]
    if schema["type"] == "string" and not {"enum", "const", "format"} & schema.keys():
        schema["default"] = ""
    return schema
