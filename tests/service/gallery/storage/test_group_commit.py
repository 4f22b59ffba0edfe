"""Commits: synced before they are answered, shared by those that wait, and each for itself."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection, event, text

from service.errors import DatabaseUnavailable, IdempotencyConflict, ServiceError, StorageFull
from service.gallery.records import RequestKey
from service.gallery.storage.audit import Act
from service.gallery.storage.database import FILE_NAME
from service.gallery.storage.store import Store
from tests.paths import ROOT
from tests.service.postgres import PostgresServer
from tests.service.stores import MODEL, SIZE, all_of, new, rows
from tests.service.syscalls import writes_and_syncs


class _Gate:
    """Holds the first commit back until it is opened, and counts all of them."""

    def __init__(self, store: Store) -> None:
        self.commits = 0
        self.held = threading.Event()
        self.opened = threading.Event()
        event.listen(store.database.engine, "commit", self._on_commit)

    def _on_commit(self, connection: object) -> None:
        self.commits += 1
        if self.commits == 1:
            self.held.set()
            assert self.opened.wait(60)


def _together(
    store: Store, gate: _Gate, calls: Sequence[Callable[[], object]]
) -> list[BaseException | None]:
    """Run the first call up to its commit and the others behind it → what each raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(calls[0])]
        assert gate.held.wait(60)
        futures += [pool.submit(call) for call in calls[1:]]
        while len(store._commits._waiting) < len(calls) - 1:
            threading.Event().wait(0.001)
        gate.opened.set()
    return [future.exception() for future in futures]


def test_calls_that_wait_share_one_commit(store: Store) -> None:
    gate = _Gate(store)
    calls = [partial(store.add, new(2), rows(2, seed=i)) for i in range(12)]
    assert _together(store, gate, calls) == [None] * 12
    assert gate.commits == 2
    stored = [tuple(row[-1]) for row in all_of(store).values()]
    assert sorted(stored) == sorted(tuple(r) for i in range(12) for r in rows(2, seed=i).tolist())


def test_a_lone_call_commits_alone(store: Store) -> None:
    gate = _Gate(store)
    gate.opened.set()
    for i in range(3):
        store.add(new(1), rows(1))
        assert gate.commits == i + 1


def test_an_entry_of_the_audit_log_shares_the_commit_of_those_that_write(store: Store) -> None:
    acts = [Act("key:1", "query", "ä", {"n": n}) for n in range(3)]
    store.audit.append(acts[0])
    gate = _Gate(store)
    note = [partial(store.audit.append, act) for act in acts[1:]]
    assert _together(store, gate, [partial(store.add, new(2), rows(2)), *note]) == [None] * 3
    assert gate.commits == 2
    entries = store.audit.page(9).entries[::-1]
    assert [Act(e.actor, e.action, e.subject, e.details) for e in entries] == acts


def test_one_call_fails_alone(store: Store) -> None:
    gate = _Gate(store)
    key = RequestKey("key", "c" * 64)
    calls = [partial(store.add, new(2, request=r), rows(2)) for r in (None, key, None, None)]
    first, twice, *rest = _together(store, gate, calls)
    assert isinstance(twice, IdempotencyConflict)  # two items of one call under one key
    assert [first, *rest] == [None] * 3
    assert store.count() == 6
    assert store.enrolled_by(key) is None


def test_a_failed_commit_fails_everybody(store: Store) -> None:
    gate = _Gate(store)

    def cut(connection: object) -> None:
        if gate.commits == 2:
            raise _cut_off(store)

    event.listen(store.database.engine, "commit", cut)
    calls = [partial(store.add, new(2), rows(2, seed=i)) for i in range(5)]
    first, *others = _together(store, gate, calls)
    assert first is None
    assert all(isinstance(error, DatabaseUnavailable) for error in others)
    assert len(all_of(store)) == store.count() == 2
    assert len(store.add(new(1), rows(1))) == 1


def _cut_off(store: Store) -> Exception:
    error: Exception = store.database.engine.dialect.loaded_dbapi.OperationalError("cut off")
    return error


def test_a_full_disk_fails_its_transaction_whole(tmp_path: Path) -> None:
    store = Store(tmp_path, MODEL, SIZE)
    gate = _Gate(store)
    pages = [1 << 20]
    event.listen(
        store.database.engine,
        "checkout",
        lambda connection, *_: connection.execute(f"PRAGMA max_page_count = {pages[0]}"),
    )
    with store.database.engine.connect() as connection:
        used = connection.execute(text("PRAGMA page_count")).scalar_one()

    def first() -> object:
        done = store.add(new(1), rows(1))
        pages[0] = used + 4
        return done

    big, small = (lambda: store.add(new(300), rows(300))), (lambda: store.add(new(1), rows(1)))
    assert isinstance(_together(store, gate, [first, small, big])[2], StorageFull)
    pages[0] = 1 << 20
    assert store.count() == len(all_of(store)) <= 2
    store.add(new(300), rows(300))
    store.close()


def test_a_connection_cut_in_a_shared_transaction_fails_all_in_it(
    postgres: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    store = Store(tmp_path, MODEL, SIZE, postgres_url)
    gate = _Gate(store)

    def cut() -> None:
        def work(connection: Connection) -> None:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            postgres.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
            connection.exec_driver_sql("SELECT 1")

        store._commits.run(work)

    add = partial(store.add, new(2), rows(2))
    first, *shared = _together(store, gate, [add, add, cut, add])
    assert first is None
    assert all(isinstance(error, ServiceError) and error.status == 503 for error in shared)
    assert store.count() == 2
    store.add(new(2), rows(2))
    assert store.count() == 4
    store.close()


# --- on the disk before the answer ---


@pytest.mark.parametrize("call", ["add(new(3), rows(3))", "audit.append(Act('key:1', 'query'))"])
def test_a_write_returns_after_the_log_is_synced(tmp_path: Path, call: str) -> None:
    """Everything that it wrote to SQLite's log is synced before the caller goes on."""
    code = f"""
        import os, sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        from tests.service.stores import MODEL, SIZE, new, rows
        from service.gallery.storage.audit import Act
        from service.gallery.storage.store import Store
        store = Store(Path({str(tmp_path)!r}), MODEL, SIZE)
        os.write(1, b"open")
        os.read(0, 1)
        store.{call}
        os.write(1, b"added")
        os._exit(0)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert os.read(child.stdout.fileno(), 4) == b"open"
    entry = child.stdin.fileno()
    calls = list(writes_and_syncs(child.pid, lambda: os.write(entry, b"!")))
    log = str(tmp_path / f"{FILE_NAME}-wal")
    ours = [name for name, file in calls if file == log]
    assert "pwrite64" in ours
    assert ours[-1] in ("fdatasync", "fsync"), ours
    last, file = calls[-1]  # "added", after it all
    assert last == "write"
    assert file.startswith("pipe:")
    child.stdin.close()
    child.stdout.close()


def test_sqlite_syncs_every_commit_of_every_connection(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    store = Store(tmp_path / "data", MODEL, SIZE, f"sqlite:///{tmp_path / 'own.sqlite3'}")
    with store.database.reading() as connection:
        values = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
        ]
    assert values == ["wal", 2, 1, 1]
    store.close()


@pytest.mark.parametrize(("given", "used"), [("off", "on"), ("remote_apply", "remote_apply")])
def test_postgresql_never_answers_before_the_disk(
    postgres: PostgresServer, postgres_url: str, tmp_path: Path, given: str, used: str
) -> None:
    name = postgres_url.partition("?")[0].rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET synchronous_commit = {given}")
    store = Store(tmp_path, MODEL, SIZE, postgres_url)
    with store.database.writing() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == used
    store.close()
