"""The HTTP protocol of one connection: it ends where the client is too slow, and in good order.

A connection that is closed while its client still sends is reset by the kernel, and the reset may
destroy an answer that the client has not read: a proxy then reports 502 where the service said 413.
So the answer is sent, and what still arrives is read and dropped, within bounds. The sending half
is closed once the body has come to its end, or pauses: a proxy may take its end for a reason to
close the connection of a client that still sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.errors import RequestMalformed
from service.http.exception_handlers import MEDIA_TYPE, problem_of
from service.http.middleware import SecurityHeaders

Awaited = Literal["headers", "body"]

# Bounds of a connection that drops what arrives after its answer; `body_timeout` bounds it too.
_LINGER_PAUSE = 1.0  # seconds without a byte after which the sending half is closed
_LINGER_IDLE = 5.0  # seconds without a byte after which the connection is
_LINGER_BYTES = 512_000_000
_LINGERING = 256  # at the same time; the one that lingers longest makes room


class _Transport:
    """A connection as uvicorn sees it, which is closed in good order.

    The head of an answer is sent together with what follows: one system call, and one time that the
    client is woken.
    """

    def __init__(
        self, transport: Any, close: Callable[[], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._transport, self._loop = transport, loop
        self._held = b""
        self.close = close
        self.closed = False

    def write(self, data: bytes) -> None:
        """Send what was held back and this, or hold this back until something else happens."""
        if self._held:
            data, self._held = self._held + data, b""
            self._transport.write(data)
        elif data:
            self._held = data
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what was held back."""
        held, self._held = self._held, b""  # first: writing may ask for the size, which flushes
        if held and not self._transport.is_closing():
            self._transport.write(held)

    def get_write_buffer_size(self) -> int:
        self.flush()
        return int(self._transport.get_write_buffer_size())

    def is_closing(self) -> bool:
        return self.closed or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, with time limits in seconds.

    header_timeout: from a request's first byte, or from opening the connection, to the end of its
    headers. body_timeout: for what is left of a body once it was answered, and for a client
    that does not read its answer. Between requests uvicorn's own timeout applies; `service.api`
    limits the time of a body that it reads. lingering: all connections that drop what arrives.
    """

    def __init__(
        self,
        *arguments: Any,
        header_timeout: float,
        body_timeout: float,
        lingering: Lingering,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._socket: Any = None
        self._lingering, self._dropped, self._heard, self._ended = lingering, 0, 0.0, False
        self._timeouts: dict[Awaited, float] = {"headers": header_timeout, "body": body_timeout}
        self._awaited: Awaited | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    # --- what uvicorn and the event loop call ---

    def connection_made(self, transport: Any) -> None:
        self._socket = transport
        super().connection_made(_Transport(transport, self._close, self.loop))  # type: ignore[arg-type]
        self._await("headers")

    def data_received(self, data: bytes) -> None:
        if self in self._lingering:
            self._drop(data)
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await("headers")
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            self._await("body")
        else:
            self._await(None)

    def on_response_complete(self) -> None:
        self.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._await("body")
        self._watch_if_closing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_if_closing()

    def shutdown(self) -> None:
        if self in self._lingering:
            self._socket.close()
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lingering.pop(self, None)
        self._await(None)
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()
        self._watch_if_closing()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with a problem document, unless an answer has begun.

        uvicorn answers in plain text, and fails where an answer has begun.
        """
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in _malformed_request():
                self.transport.write(self.conn.send(event))
        if self.cycle is not None:  # what it still sends is discarded
            self.cycle.disconnected = True
        self.transport.close()
        self._watch_if_closing()

    # --- closing while the client still sends ---

    def _close(self) -> None:
        """Close the connection, once the client has stopped sending if it has an answer to read."""
        unread = self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or self.conn.trailing_data[0]
        answered = self.conn.our_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
        if self.transport.is_closing():
            return
        self.transport.flush()  # type: ignore[attr-defined]
        if not unread or not answered:
            self._socket.close()
            return
        if len(self._lingering) >= _LINGERING:
            oldest = next(iter(self._lingering))
            del self._lingering[oldest]
            oldest._socket.close()
        self._lingering[self] = None
        self.transport.closed = True  # type: ignore[attr-defined]
        self._await(None)
        self._watch_if_closing()
        self._socket.resume_reading()
        self._drop(b"")
        self._listen()

    def _drop(self, data: bytes) -> None:
        """Read what arrives after the answer, to notice the end of the body."""
        self._heard = self.loop.time()
        self._dropped += len(data)
        if self._dropped > _LINGER_BYTES:
            self._socket.close()
            return
        try:
            if data:
                self.conn.receive_data(data)
            while isinstance(event := self.conn.next_event(), h11.Data):
                pass
        except h11.RemoteProtocolError:
            return  # its end cannot be told
        if event is not h11.NEED_DATA:
            self._end_sending()

    def _end_sending(self) -> None:
        if not self._ended:
            self._ended = True
            self._socket.write_eof()

    def _listen(self) -> None:
        """End the connection step by step where nothing arrives any more."""
        if self not in self._lingering or self._socket.is_closing():
            return
        silence = self.loop.time() - self._heard
        if silence >= _LINGER_IDLE:
            self._socket.close()
            return
        if silence >= _LINGER_PAUSE:
            self._end_sending()
        self.loop.call_later(_LINGER_PAUSE, self._listen)

    # --- waiting for the client to send ---

    def _await(self, what: Awaited | None) -> None:
        """Start the time limit for what the client has to send, unless it runs already."""
        if what == self._awaited:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._awaited, self._deadline = what, None
        if what is not None:
            self._deadline = self.loop.call_later(self._timeouts[what], self._too_late)

    def _too_late(self) -> None:
        self._socket.close()
        self._watch_if_closing()

    # --- waiting for the client to read ---

    def _watch_if_closing(self) -> None:
        """Watch a closing connection: it still waits for its client to read the answer."""
        if self.transport.is_closing() and self._reading is None:
            self._watch(self.transport.get_write_buffer_size())

    def _watch(self, unread: int) -> None:
        self._stop_watching()
        self._reading = self.loop.call_later(self._timeouts["body"], self._look, unread)

    def _look(self, before: int) -> None:
        """Abort the connection where the client has read nothing since the last check."""
        unread = self.transport.get_write_buffer_size()
        if unread < before:
            self._watch(unread)
        else:
            self.transport.abort()

    def _stop_watching(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None


Lingering = dict[TimedProtocol, None]
"""Connections that drop what arrives, the one that has done so longest first."""


def timed_protocol(header_timeout: float, body_timeout: float, lingering: Lingering) -> Any:
    """The protocol class for uvicorn: `TimedProtocol` with these limits in seconds."""
    return partial(
        TimedProtocol,
        header_timeout=header_timeout,
        body_timeout=body_timeout,
        lingering=lingering,
    )


def _malformed_request() -> tuple[h11.Response, h11.Data, h11.EndOfMessage]:
    """The answer to malformed HTTP: a problem document, as for every other error."""
    error = RequestMalformed("this is no request of HTTP/1.1; check what sends it")
    content = problem_of(error, "").model_dump_json(exclude={"errors"}).encode()
    headers = {
        "Content-Type": MEDIA_TYPE,
        "Content-Length": str(len(content)),
        "Content-Security-Policy": SecurityHeaders.DATA,
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
        "Connection": "close",
    }
    answer = h11.Response(status_code=error.status, headers=[*headers.items()])
    return answer, h11.Data(data=content), h11.EndOfMessage()
