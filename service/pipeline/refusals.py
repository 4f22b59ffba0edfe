"""Callers without a right to what they asked for, in the audit log: as few entries as tell it."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from anyio import sleep

from service.gallery import Act
from service.pipeline.audit_writer import AuditWriter

_SECONDS = 60.0
_MOST = 30  # callers and codes with entries of their own, in so many seconds
_OTHERS = "address:others"


class _Refusal(NamedTuple):
    caller: str
    code: str


class Refusals:
    """Notes refused requests. Used on one event loop.

    The first of a caller is written at once, and those that follow within a minute as one entry
    with their number. Beyond some callers a minute the others are counted together, so that nobody
    can fill the disk or keep its writer busy.
    """

    def __init__(self, writer: AuditWriter) -> None:
        self._writer = writer
        self._counts: dict[_Refusal, int] = {}

    def note(self, key: str | None, host: str | None, code: str, route: str) -> None:
        """Note a refusal, without waiting for the disk.

        key: the actor of a known key, for any other the address `host` counts. code: of the
        problem. route: its method and pattern. What was given as a key is never noted.
        """
        refusal = _Refusal(key or _address(host), code)
        if refusal not in self._counts and len(self._counts) >= _MOST:
            refusal = _Refusal(_OTHERS, code)
        if refusal in self._counts:
            self._counts[refusal] += 1
        else:
            self._counts[refusal] = 0
            details = {"code": code, "count": 1, "route": route}
            self._writer.post(Act(refusal.caller, "refused", details=details))

    async def run(self) -> None:
        """Write what was counted, every minute. Until cancelled."""
        while True:
            await sleep(_SECONDS)
            self.write()
            self._counts.clear()

    def write(self) -> None:
        """Write what was counted so far."""
        for refusal, count in self._counts.items():
            if count:
                details = {"code": refusal.code, "count": count}
                self._writer.post(Act(refusal.caller, "refused", details=details))
                self._counts[refusal] = 0


def _address(host: str | None) -> str:
    """The caller at an address; for IPv6 its network, of which one caller has all addresses."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return "address:unknown"
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        if address.ipv4_mapped is not None:
            return f"address:{address.ipv4_mapped}"
        return f"address:{ipaddress.IPv6Network((address.packed, 64), strict=False)}"
    return f"address:{address}"
