"""Who may call which route, by the scope of the bearer key that the request carries."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, cast
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
    ("GET", "/"): None,
    ("GET", "/page/{path}"): None,
    ("GET", "/docs"): None,
    ("GET", "/docs/{asset}"): None,
}


bearer = HTTPBearer(
    auto_error=False, description="A key made by `cmt keys create`, where the service has keys."
)


async def authorise(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> None:
    """Let the request through, or raise Unauthorized, ScopeMissing, OriginRefused or RateLimited.

    Runs before any body is read. Closed by default: a route missing from ROUTE_SCOPES is refused.
    Sets `request.state.actor` to the caller: `key:ID`, or `address:IP` where there are no keys.
    """
    route = (request.method, request.scope["route"].path_format)
    if route in ROUTE_SCOPES and ROUTE_SCOPES[route] is None:
        return
    resources = request.state.resources
    try:
        rate = _let_in(request, route, credentials)
    except (Unauthorized, ScopeMissing, OriginRefused) as error:
        host = request.client.host if request.client else None
        key = getattr(request.state, "actor", None)
        resources.pipeline.refusals.note(key, host, error.code, " ".join(route))
        raise
    await resources.rates.count(request.state.actor, rate)


def _let_in(
    request: Request, route: tuple[str, str], credentials: HTTPAuthorizationCredentials | None
) -> str | None:
    """Set the caller → its own rate, if it has one."""
    keyring = request.state.resources.keyring
    _refuse_other_sites(request)
    if keyring.open:
        _refuse_other_hosts(request)
        request.state.actor = f"address:{request.client.host if request.client else 'unknown'}"
        return None
    key = None if credentials is None else keyring.find(credentials.credentials)
    if key is None:
        raise Unauthorized(
            "send a known key as `Authorization: Bearer KEY`, for `cmt` in CMT_API_KEY; "
            "`cmt keys create` makes one",
            headers={"WWW-Authenticate": "Bearer"},
        )
    request.state.actor = f"key:{key.id}"
    scope = ROUTE_SCOPES.get(route)
    if scope not in key.scopes:
        raise ScopeMissing(f"this key may not do that; use one with the scope {scope!r}")
    return cast("str | None", key.rate)


def _refuse_other_sites(request: Request) -> None:
    """Keep other sites' pages, open in the browser of somebody who may call, from calling.

    A script of theirs sends its Origin; the browser would carry out the request and only hide the
    answer. A picture or an old form sends none, but browsers add Sec-Fetch-Site (all of them since
    2023), and other clients send neither. Following a link is no call: the other site learns
    nothing. Where there are keys a page has none to send, but a proxy in between may add one.
    """
    allowed = request.state.resources.settings.cors_origins
    origin = request.headers.get("origin")
    if origin in allowed:
        return
    own = request.headers.get("host", "")
    keys = not request.state.resources.keyring.open
    if origin is not None and not keys and _authority(origin) != own:
        raise _of_another_site(origin[:100])
    site = request.headers.get("sec-fetch-site", "none").lower()
    if site not in ("none", "same-origin") and not _is_navigation(request):
        raise _of_another_site("other sites" if origin is None else origin[:100])


def _of_another_site(origin: str) -> OriginRefused:
    return OriginRefused(
        f"pages of {origin} may not call this service; add the origin to CMT_CORS_ORIGINS, and let "
        "the page send it (for a picture, by the attribute crossorigin)"
    )


def _is_navigation(request: Request) -> bool:
    """Whether somebody follows a link or bookmark, in a window of its own."""
    return (
        request.method in ("GET", "HEAD")
        and request.headers.get("sec-fetch-mode") == "navigate"
        and request.headers.get("sec-fetch-dest") == "document"
    )


def _refuse_other_hosts(request: Request) -> None:
    """Keep a page of the web away whose own domain resolves to 127.0.0.1: without keys only."""
    if not _is_local_name(request.headers.get("host", "")):
        raise OriginRefused(
            "without API keys the service answers only as localhost or a loopback address; call "
            "it by that, or set CMT_API_KEYS_FILE"
        )


def _authority(origin: str) -> str | None:
    """Host and port of an origin; None where it is none, such as http://[."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


@lru_cache(maxsize=64)
def _is_local_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
