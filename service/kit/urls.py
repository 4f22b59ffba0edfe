"""Addresses: whether one is this machine's, and how one may be shown."""

from __future__ import annotations

import ipaddress
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `service.client` calls `is_loopback` and must not load SQLAlchemy
    from sqlalchemy import URL


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
