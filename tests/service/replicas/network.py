"""A network between a replica and its PostgreSQL server that the test stops, cuts and mends."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import make_url


class Network:
    """Forwards TCP connections to a server's socket. `url` is the server's address through it.

    Stopped, it takes what both sides send and delivers nothing, as a link does that is down and
    whose ends are up. Cut, it resets every connection.
    """

    def __init__(self, server: str) -> None:
        target = make_url(server)
        self._target = Path(str(target.query["host"])) / ".s.PGSQL.5432"
        self._listener = socket.create_server(("127.0.0.1", 0))
        address = target.set(host="127.0.0.1", port=self._listener.getsockname()[1], query={})
        self.url = address.render_as_string(hide_password=False)
        self._flows = threading.Event()
        self._flows.set()
        self._ends: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._flows.set()
        self._accepting.join()

    def stop(self) -> None:
        """Deliver nothing until `mend`."""
        self._flows.clear()

    def mend(self) -> None:
        """Deliver what was held back, and go on."""
        self._flows.set()

    def cut(self) -> None:
        """Break every connection; new ones may come."""
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                with suppress(OSError):  # a server that is down: the client sees a closed door
                    server.connect(str(self._target))
                self._ends |= {client, server}
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                target.sendall(data)
        for end in (source, target):
            self._ends.discard(end)
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
