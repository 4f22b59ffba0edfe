"""What a request says of itself, made sound before anything else reads it.

How its body is framed, where it is addressed to, and what a trusted proxy says about the client.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import RequestMalformed
from service.http import exception_handlers as problems
from service.kit.urls import Address, address_in, checked_prefix

_HOST = re.compile(r"(\[[\w:.%-]+\]|[\w.~!$&'()*+,;=%-]*)(:\d{0,5})?", re.ASCII)
_ABSOLUTE = re.compile(rb"https?://([^/]*)(/.*)?", re.IGNORECASE | re.DOTALL)

# What is left of a body may be this long for its connection to be used again after an answer.
_DRAINED_BYTES = 1_000_000


class Intake:
    """Refuses ambiguous framing and bad hosts, understands targets, and believes trusted proxies.

    - Content-Length beside Transfer-Encoding, which another server on the way may read
      differently, is refused, and so is a Host that is none (RFC 9112, 6.1 and 3.2).
    - An absolute target (`GET http://host/path`) is served; its host replaces the header's.
    - HEAD is answered as GET; the server leaves out the body.
    - X-Forwarded-For, -Proto and -Prefix hold where `trusted` has the peer and they are sound.
    - An answer that is given long before the end of a body says that the connection is closed.
    - The place where the service is mounted leads to the page, which is one slash further.

    root_path: where the service is mounted, unless a trusted proxy says so.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[str], root_path: str) -> None:
        self.app, self._root_path = app, root_path
        self._trusted = [ipaddress.ip_network(network) for network in trusted]
        self._believes = lru_cache(maxsize=1024)(self._is_proxy)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            _check_framing(scope)
            _take_target_apart(scope)
        except RequestMalformed as error:
            await problems.response(Request(scope), error)(scope, receive, send)
            return
        prefix = self._believe(scope) or self._root_path
        if prefix and scope["path"] == prefix and scope["method"] in ("GET", "HEAD"):
            # The links of the page are relative: they lead nowhere without the slash.
            await RedirectResponse(f"{prefix}/", 308)(scope, receive, send)
            return
        if prefix:
            _mount(scope, prefix)
        receive, send = _telling_early_answers(scope, receive, send)
        if scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        inner = {**scope, "method": "GET"}
        try:
            await self.app(inner, receive, send)
        finally:
            scope["route"] = inner.get("route")  # for the log

    def _believe(self, scope: Scope) -> str:
        """Take over client and scheme from a trusted proxy → the prefix that it states, or ''."""
        if not self._believes((scope.get("client") or ("", 0))[0]):
            return ""
        headers = Headers(scope=scope)
        client = self._client(headers.getlist("x-forwarded-for"))
        if client is not None:
            scope["client"] = (str(client), 0)
        schemes = [
            scheme.strip().lower()
            for value in headers.getlist("x-forwarded-proto")
            for scheme in value.split(",")
        ]
        if schemes and set(schemes) <= {"http", "https"}:
            scope["scheme"] = schemes[0]
        prefixes = headers.getlist("x-forwarded-prefix")
        try:
            return checked_prefix(prefixes[0]) if len(prefixes) == 1 else ""
        except ValueError:
            return ""

    def _client(self, forwarded: Sequence[str]) -> Address | None:
        """The last address that no trusted proxy has; None where something else stands there."""
        client = None
        for hop in reversed(",".join(forwarded).split(",")):
            client = address_in(hop)
            if client is None or not self._trusts(client):
                break
        return client

    def _is_proxy(self, peer: str) -> bool:
        address = address_in(peer)
        return address is not None and self._trusts(address)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _values(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header. Every request is asked for a few: `Headers` would take longer."""
    return [value for key, value in scope["headers"] if key == name]


def _check_framing(scope: Scope) -> None:
    if _values(scope, b"transfer-encoding") and (
        scope["http_version"] == "1.0" or _values(scope, b"content-length")
    ):
        raise RequestMalformed(
            "the length of the body is stated in two ways; send Content-Length or, in HTTP/1.1, "
            "Transfer-Encoding",
            headers={"Connection": "close"},
        )
    if not all(map(_is_host, _values(scope, b"host"))):
        raise _bad_host()


def _is_host(text: bytes) -> bool:
    return _HOST.fullmatch(text.decode("latin-1")) is not None


def _take_target_apart(scope: Scope) -> None:
    """A target in absolute form as if it came in the usual one, with its host as the Host."""
    absolute = _ABSOLUTE.fullmatch(scope["raw_path"])
    if absolute is None:
        return
    if not absolute[1] or not _is_host(absolute[1]):
        raise _bad_host()
    scope["raw_path"] = absolute[2] or b"/"
    scope["path"] = unquote(scope["raw_path"].decode("latin-1"))
    others = [header for header in scope["headers"] if header[0] != b"host"]
    scope["headers"] = [(b"host", absolute[1]), *others]


def _bad_host() -> RequestMalformed:
    return RequestMalformed("the host of the request is no name or address; check what sends it")


def _mount(scope: Scope, prefix: str) -> None:
    """State where the service is mounted; the proxy may have taken the prefix off, or not."""
    scope["root_path"] = prefix
    if scope["path"] != prefix and not scope["path"].startswith(f"{prefix}/"):
        scope["path"] = prefix + scope["path"]
        scope["raw_path"] = prefix.encode() + scope["raw_path"]


def _telling_early_answers(scope: Scope, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """Receive and send, so that an answer long before the end of the body says `close`.

    Otherwise a client would send all the rest to a connection that drops it, and one that waits
    for `100 Continue` might send its next request where the body is expected.
    """
    chunked = _values(scope, b"transfer-encoding")
    left = float("inf") if chunked else int(next(iter(_values(scope, b"content-length")), 0))
    waits = [value.lower() for value in _values(scope, b"expect")[:1]] == [b"100-continue"]

    async def counted() -> Message:
        nonlocal left, waits
        waits = False  # the server asks for the body when it is first received
        message = await receive()
        if message["type"] == "http.request":
            left = left - len(message["body"]) if message.get("more_body") else 0
        return message

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start" and (
            left > _DRAINED_BYTES or (waits and left > 0)
        ):
            MutableHeaders(scope=message)["Connection"] = "close"
        await send(message)

    return counted, told
