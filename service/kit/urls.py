"""What an address says: whether it is this machine's, and how people may see it."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the thin client asks `is_loopback` and loads no SQLAlchemy
    from sqlalchemy import URL


def without_password(address: URL) -> str:
    """An address as people may see it. libpq takes a password among the parameters too."""
    told = {name: value for name, value in address.query.items() if "pass" not in name.lower()}
    return address.set(query=told).render_as_string(hide_password=True)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service that binds to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
