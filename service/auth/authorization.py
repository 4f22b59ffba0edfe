"""Who may call which route, by the scope of the bearer key that the request carries."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.auth.keys import Scope
from service.errors import OriginRefused, ScopeMissing, Unauthorized

# The only table of who may do what; None is open to all. A route that is not in it is refused.
ROUTE_SCOPES: Mapping[tuple[str, str], Scope | None] = {
    ("POST", "/gallery"): "enroll",
    ("POST", "/gallery/batch"): "enroll",
    ("GET", "/gallery"): "query",
    ("DELETE", "/gallery"): "admin",
    ("GET", "/gallery/{id}"): "query",
    ("PATCH", "/gallery/{id}"): "enroll",
    ("DELETE", "/gallery/{id}"): "enroll",
    ("GET", "/gallery/{id}/image"): "query",
    ("POST", "/query"): "query",
    ("GET", "/cameras"): "query",
    ("GET", "/cameras/{camera_id}"): "query",
    ("PUT", "/cameras/{camera_id}"): "admin",
    ("DELETE", "/cameras/{camera_id}"): "admin",
    ("GET", "/model"): "query",
    ("GET", "/metrics"): "query",
    ("POST", "/admin/backup"): "admin",
    ("POST", "/admin/reembed"): "admin",
    ("GET", "/admin/reembed"): "admin",
    ("GET", "/admin/audit"): "admin",
    ("GET", "/admin/versions"): "admin",
    ("DELETE", "/admin/versions/{fingerprint}"): "admin",
    ("GET", "/livez"): None,
    ("GET", "/readyz"): None,
    ("GET", "/openapi.json"): None,
    ("GET", "/docs"): None,
    ("GET", "/docs/{asset}"): None,
}


_bearer = HTTPBearer(
    auto_error=False, description="A key made by `cmt keys create`, where the service has keys."
)


async def authorise(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> None:
    """Let the request through, or raise Unauthorized, ScopeMissing, OriginRefused or RateLimited.

    Runs before any body is read. Closed by default: a route missing from ROUTE_SCOPES is refused.
    Sets `request.state.actor` to the caller: `key:ID`, or `address:IP` where there are no keys.
    """
    route = (request.method, request.scope["route"].path_format)
    if route in ROUTE_SCOPES and ROUTE_SCOPES[route] is None:
        return
    resources = request.state.resources
    keyring = resources.keyring
    if keyring.open:
        _refuse_other_sites(request)
        request.state.actor = f"address:{request.client.host if request.client else 'unknown'}"
        resources.rates.count(request.state.actor)
        return
    key = None if credentials is None else keyring.find(credentials.credentials)
    if key is None:
        raise Unauthorized(
            "send a known key as `Authorization: Bearer KEY`; `cmt keys create` makes one",
            headers={"WWW-Authenticate": "Bearer"},
        )
    scope = ROUTE_SCOPES.get(route)
    if scope not in key.scopes:
        raise ScopeMissing(f"this key may not do that; use one with the scope {scope!r}")
    request.state.actor = f"key:{key.id}"
    resources.rates.count(request.state.actor, key.rate)


def _refuse_other_sites(request: Request) -> None:
    """Keep a page from the web, open in this machine's browser, away from a service without keys.

    Such a page reaches loopback by a plain form (it then sends its Origin) or by a domain of its
    own that resolves to 127.0.0.1 (the Host is then that domain).
    """
    host = request.headers.get("host", "")
    if not _is_local_name(host):
        raise OriginRefused(
            "without API keys the service answers only as localhost or a loopback address; call "
            "it by that, or set CMT_API_KEYS_FILE"
        )
    origin = request.headers.get("origin")
    allowed = request.state.resources.settings.cors_origins
    if origin is not None and origin not in allowed and _authority(origin) != host:
        raise OriginRefused(
            f"pages of {origin[:100]} may not call this service; add the origin to CMT_CORS_ORIGINS"
        )


def _authority(origin: str) -> str | None:
    """Host and port of an origin; None where it is none, such as http://[."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _is_local_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
