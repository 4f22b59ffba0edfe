"""A wire to a PostgreSQL server that can be cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import URL, make_url


class Wire:
    """Forwards connections to a server until told to lose one commit's answer.

    `lose_next_commit` cuts the connection after the server has executed a write's COMMIT and before
    its answer arrives, so that the client cannot know whether it happened.
    """

    def __init__(self, folder: Path, server: URL) -> None:
        (self._target,) = [Path(str(server.query["host"])) / ".s.PGSQL.5432"]
        self.url = server.set(query={"host": str(folder)}).render_as_string(hide_password=False)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen()
        self._losing = threading.Event()

    def lose_next_commit(self) -> None:
        self._losing.set()

    def serve(self) -> None:
        """Accept connections until `close`."""
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._target))
                for work in (self._forward, self._backward):
                    threading.Thread(target=work, args=(client, server), daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        writes = False
        with suppress(OSError):
            while data := client.recv(1 << 16):
                # Only a writing transaction takes the lock; readers commit too.
                writes = b"pg_advisory_xact_lock" in data or (writes and b"BEGIN" not in data)
                if writes and b"COMMIT\0" in data and self._losing.is_set():
                    client.shutdown(socket.SHUT_RDWR)  # before the server can answer
                    self._losing.clear()
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _backward(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)


@contextmanager
def wired(folder: Path, server: str) -> Iterator[Wire]:
    """A wire to the server of this URL."""
    wire = Wire(folder, make_url(server))
    thread = threading.Thread(target=wire.serve)
    thread.start()
    try:
        yield wire
    finally:
        wire.close()
        thread.join()
