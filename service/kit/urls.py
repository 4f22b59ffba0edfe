"""Addresses and paths: whose one is, how one may be shown, and whether one is one at all."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `service.client` calls `is_loopback` and must not load SQLAlchemy
    from sqlalchemy import URL

DEFAULT_URL = "http://127.0.0.1:8000"
"""Of a service with the settings' defaults."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_WITH_PORT = re.compile(r"(?:\[([^]]*)\]|([\d.]+))(?::\d{1,5})?", re.ASCII)
_PREFIX = re.compile(r"(/[\w.~@:+=-]+)*/?", re.ASCII)


def without_password(address: URL) -> str:
    """An address as logs may show it. libpq takes a password among the parameters too."""
    shown = {name: value for name, value in address.query.items() if "pass" not in name.lower()}
    database = address.database
    if database is not None:  # the name of a file need not be text
        database = os.fsencode(database).decode(errors="backslashreplace")
    return address.set(database=database, query=shown).render_as_string(hide_password=True)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service that binds to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address_in(text: str) -> Address | None:
    """The address that a proxy wrote, maybe in brackets, with a port or a zone; None if it is none.

    An IPv4 address inside an IPv6 one is given as itself.
    """
    text = text.strip()
    match = _WITH_PORT.fullmatch(text)
    if match is not None:
        text = match[1] or match[2] or ""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def checked_prefix(text: str) -> str:
    """Return a path under which something is mounted, without a slash at its end: '' for the root.

    Raises ValueError, one sentence, for what is no plain path.
    """
    if not _PREFIX.fullmatch(text) or {".", ".."} & set(text.split("/")):
        raise ValueError(f"{text[:100]!r} is no plain path; write one such as /reid")
    return text.rstrip("/")


def route_path(scope: Mapping[str, Any]) -> str:
    """The path of a request within the service, wherever that is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
