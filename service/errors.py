"""Every error a client can meet: one base class, each with its status, stable code and title.

The handler in `service.app` turns all of them into `application/problem+json` (RFC 9457). The
detail is one sentence that names the remedy.
"""

from __future__ import annotations


class ServiceError(Exception):
    """Base of all errors that reach a client; `detail` is the sentence the client reads."""

    status: int = 500
    code: str = "internal_error"
    title: str = "Internal error"

    def __init__(self, detail: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = headers or {}
