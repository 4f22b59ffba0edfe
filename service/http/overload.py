"""Uploads that find no place are refused before anything else is done for them."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http import exception_handlers as problems
from service.http.admission import Admission
from service.kit.urls import route_path

_UPLOADS = frozenset({"/query", "/gallery", "/gallery/batch"})


class OverloadMiddleware:
    """Refuses uploads at once where all places are taken: who they are from is not looked at.

    A refusal costs time of the event loop, which the accepted uploads need. `read_upload` refuses
    those that lose their place later.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            path = route_path(scope)
            resources = scope.get("state", {}).get("resources")
            if path in _UPLOADS and resources is not None:
                admission: Admission = resources.admission
                if (refusal := admission.refusal()) is not None:
                    scope["route"] = SimpleNamespace(path_format=path)  # for log and metrics
                    await asyncio.sleep(admission.before_refusal(time.monotonic()))
                    await problems.response(Request(scope), refusal)(scope, receive, send)
                    return
        await self.app(scope, receive, send)
