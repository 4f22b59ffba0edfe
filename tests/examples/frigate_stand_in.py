"""The other side of the Frigate example: its HTTP API, and an MQTT broker, as small as can be."""

from __future__ import annotations

import json
import socket
import struct
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit


class FrigateStandIn:
    """Frigate's API with what the test puts into it: events, and files by path."""

    def __init__(self, password: str | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.logins = 0
        self.down = False
        self.old = False  # a release that does not know the parameter `sort`
        password_is = password
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                if stand_in.down:
                    self._answer(502, b"bad gateway")
                elif password_is is not None and "frigate_token=t" not in self.headers.get(
                    "Cookie", ""
                ):
                    self._answer(401, b"{}")
                elif url.path == "/api/events":
                    self._answer(200, stand_in.listed(parse_qs(url.query)))
                elif url.path in stand_in.files:
                    self._answer(200, stand_in.files[url.path])
                else:
                    self._answer(404, b'{"success": false, "message": "not found"}')

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                good = body == {"user": "viewer", "password": password_is}
                stand_in.logins += good
                cookie = {"Set-Cookie": "frigate_token=t; HttpOnly; Path=/"} if good else {}
                self._answer(200 if good else 401, b"{}", cookie)

            def _answer(self, status: int, body: bytes, more: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (more or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def listed(self, query: dict[str, list[str]]) -> bytes:
        """What GET /api/events answers: those with a label that began after a time, in order."""
        after, limit = float(query["after"][0]), int(query["limit"][0])
        assert query["sort"] == ["date_asc"]
        found = [
            event
            for event in sorted(self.events, key=lambda one: one["start_time"], reverse=self.old)
            if event["label"] in query["labels"][0].split(",") and event["start_time"] > after
        ]
        return json.dumps(found[:limit]).encode()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class Broker:
    """MQTT 3.1.1 with quality of service 0: what is published goes to all that subscribed."""

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.topics: list[str] = []
        self._connections: list[socket.socket] = []
        self._subscribed: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def subscribed(self) -> int:
        """How many have subscribed."""
        return len(self._subscribed)

    def publish(self, topic: str, payload: bytes) -> None:
        """Send a message to all that have subscribed."""
        name = topic.encode()
        body = struct.pack("!H", len(name)) + name + payload
        for connection in self._subscribed:
            connection.sendall(b"\x30" + _length(len(body)) + body)

    def close(self) -> None:
        """End, with all connections."""
        for connection in (self._listener, *self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, EOFError):
            while True:
                kind, body = _packet(connection)
                if kind == 1:  # CONNECT → CONNACK
                    connection.sendall(b"\x20\x02\x00\x00")
                elif kind == 8:  # SUBSCRIBE → SUBACK
                    size = struct.unpack("!H", body[2:4])[0]
                    self.topics.append(body[4 : 4 + size].decode())
                    connection.sendall(b"\x90\x03" + body[:2] + b"\x00")
                    self._subscribed.append(connection)
                elif kind == 12:  # PINGREQ → PINGRESP
                    connection.sendall(b"\xd0\x00")


def _packet(connection: socket.socket) -> tuple[int, bytes]:
    first = _exactly(connection, 1)[0]
    size = shift = 0
    while True:
        byte = _exactly(connection, 1)[0]
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return first >> 4, _exactly(connection, size)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _length(count: int) -> bytes:
    digits = bytearray()
    while True:
        count, digit = divmod(count, 128)
        digits.append(digit | (0x80 if count else 0))
        if not count:
            return bytes(digits)
