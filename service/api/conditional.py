"""Answers that a client may have already."""

from __future__ import annotations

from fastapi import Request


def not_modified(request: Request, tag: str) -> bool:
    """Whether the client says by If-None-Match that it has the answer with this ETag (RFC 9110)."""
    given = ",".join(request.headers.getlist("if-none-match")).split(",")
    known = {one.strip().removeprefix("W/") for one in given}
    return "*" in known or tag.removeprefix("W/") in known
