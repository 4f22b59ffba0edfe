"""The database behind a gallery: its transactions, migrations, and its errors as sentences.

SQLite is one file with one writer, and its log is synced at every commit. On PostgreSQL every
writing transaction takes the same advisory lock first, so that there too commits come one after
another and numbers become visible in order.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    column,
    create_engine,
    event,
    inspect,
    make_url,
    select,
    table,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from service.errors import (
    DatabaseUnavailable,
    GalleryDamaged,
    GalleryVersion,
    IdempotencyConflict,
    ServiceError,
    StorageFull,
    StorageUnwritable,
)
from service.gallery.storage.folder_lock import FolderLock
from service.gallery.storage.sqlite_file import BUSY_SECONDS, SqliteFile
from service.gallery.storage.tables import REVISION
from service.kit.urls import without_password

if TYPE_CHECKING:
    from alembic.config import Config

FILE_NAME = "gallery.sqlite3"
_MIGRATIONS = Path(__file__).parent / "migrations"
_NOTED = table("alembic_version", column("version_num"))
_KEPT_OPEN = 8  # SQLite's connections; more are opened and closed where more reads run at once
_TRUNCATE_MILLISECONDS = 2000  # how long a deletion waits for readers
_ADVISORY_LOCK = 0x636D745F72656964  # any number that no other program's lock has
_POSTGRES_DISK_FULL, _POSTGRES_READ_ONLY = "53100", "25006"
_PASSWORD_FILE = "password_file"
PAUSE_SECONDS = 5
"""So long a replica may pause within a transaction before the server takes it back: one that is
stopped, or cut off, would keep all others from writing."""
# At the start of a writing transaction, and for it alone: behind a pooler the next transaction of
# this connection may be another session's. Any other value than off waits for the disk.
_POSTGRES_WRITES = f"""
    SELECT set_config('lock_timeout', '{BUSY_SECONDS}s', true),
           set_config('idle_in_transaction_session_timeout', '{PAUSE_SECONDS}s', true),
           set_config('synchronous_commit', coalesce(
               nullif(current_setting('synchronous_commit'), 'off'), 'on'), true);
    SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})
"""
# SQLite's primary result codes (the low byte of the extended ones).
_SQLITE_READ_ONLY, _SQLITE_IO_ERROR, _SQLITE_CORRUPT, _SQLITE_FULL = 8, 10, 11, 13
_SQLITE_CANNOT_OPEN, _SQLITE_NO_DATABASE = 14, 26


class Database:
    """Transactions on the SQLite file of a data folder, or on `url`. Thread-safe.

    url: `sqlite:///FILE` or `postgresql+psycopg://…`. An SQLite file outside of the data folder
    is locked like that folder, whose lock covers a file inside it. migrate: call `migrate` at once.
    lock: that of the data folder, without which nothing may be written. Raises DatabaseUnavailable,
    GalleryLocked, GalleryVersion, GalleryDamaged, StorageUnwritable.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None = None,
        *,
        migrate: bool = True,
        lock: FolderLock | None = None,
    ) -> None:
        address = address_of(folder, url)
        self._folder = folder
        self._connected: WeakSet[Any] = WeakSet()  # the driver's connections to a server
        self._connecting = threading.Lock()
        self.sqlite = address.get_backend_name() == "sqlite"
        self._lock: FolderLock | None = None
        self._folder_lock = lock
        self._file: SqliteFile | None = None
        # SQLite's log may still hold erased pages: at first those of a process that died.
        self.wal_pending = self.sqlite
        self.copying = False  # a long transaction keeps that log open
        if self.sqlite:
            home = Path(str(address.database)).resolve().parent
            if home != folder.resolve():
                self._lock = FolderLock(home)
            self.engine = _sqlite_engine(address, self._connect)
        else:
            self.engine = _postgres_engine(address)
            event.listen(self.engine, "connect", self._remember)
        self._writer = self.engine.execution_options(
            writes=True,
            # Said in each transaction: a database or a role may have other defaults.
            **({} if self.sqlite else {"isolation_level": "READ COMMITTED"}),
        )
        self._reader = (
            self.engine
            if self.sqlite  # whose transactions read one state anyway
            else self.engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        )
        try:
            if self.sqlite:
                with self._reported():
                    self._file = SqliteFile(Path(str(address.database)))
            self._check_durable()
            if migrate:
                self.migrate()
            if self.sqlite:
                self._open_ahead()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection and release the file."""
        self.engine.dispose()
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.release()

    def check(self) -> None:
        """Raise StorageMoved unless a restart would find what is written now.

        Files that are open are also written to when they have been removed, or moved with their
        folder. This takes a few microseconds.
        """
        for opened in (self._folder_lock, self._lock, self._file):
            if opened is not None:
                opened.check()

    def save_log(self) -> None:
        """After `check` has failed: leave as little as possible to files without a name."""
        if self._file is not None:
            with self._reported():
                self._file.copy_log()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database, whatever is written meanwhile."""
        with self._reported(), self._reader.begin() as connection:
            yield connection

    def rows(self, statement: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """What a statement of SQLite finds, which by itself sees one state of the database.

        That is without the transaction and the result objects of SQLAlchemy.
        """
        with self._reported(), closing(self.engine.raw_connection()) as connection:
            assert connection.driver_connection is not None
            found: list[tuple[Any, ...]]
            found = connection.driver_connection.execute(statement, values).fetchall()
            return found

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction of the only writer; its writes are on the disk when it ends.

        Raises StorageMoved where nobody would find them there; what was moved between the two
        checks may have been written all the same, as where a connection breaks during a commit.
        """
        with self._reported():
            with self._writer.begin() as connection:
                self.check()
                yield connection
            self.check()

    def write_row(self, statement: str, row: Mapping[str, Any]) -> None:
        """Run one statement of SQLite as a transaction of its own, like `writing`.

        That is without what SQLAlchemy does around it, and in one call, in which other threads run.
        """
        with self._reported():
            with closing(self.engine.raw_connection()) as connection:
                assert connection.driver_connection is not None
                self.check()
                connection.driver_connection.execute(statement, row)
            self.check()

    @contextmanager
    def noting(self, *, together: bool = False) -> Iterator[Connection]:
        """Statements on PostgreSQL for what replicas tell each other (`Replicas`).

        They wait neither for other writers nor for the disk: nothing of a gallery may be written.
        Each is committed by itself, so that no row stays locked where this process is stopped
        after it. together: all in one transaction, whose first statement must limit its pauses.
        """
        level: Literal["AUTOCOMMIT", "READ COMMITTED"]
        level = "READ COMMITTED" if together else "AUTOCOMMIT"
        noted = self.engine.execution_options(isolation_level=level)
        with self._reported(), noted.begin() as connection:
            yield connection

    def _remember(self, connection: Any, _: Any) -> None:
        with self._connecting:
            self._connected.add(connection)

    def cut(self) -> None:
        """Cut all connections to a server that does not answer: who waits on one gets an error.

        The driver itself waits for ever where the other side is alive and silent, as a pooler is
        whose server hangs.
        """
        with self._connecting:
            connections = list(self._connected)
        for connection in connections:
            with (
                suppress(OSError, self.engine.dialect.loaded_dbapi.Error),
                socket.socket(fileno=os.dup(connection.fileno())) as wire,
            ):
                wire.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> sqlite3.Connection:
        assert self._file is not None
        return self._file.connect()

    def _open_ahead(self) -> None:
        """Fill the pool: while the folder is moved, reads go on with what is open."""
        with self._reported(), ExitStack() as held:
            for _ in range(_KEPT_OPEN):
                held.callback(self.engine.raw_connection().close)

    def truncate_log(self) -> bool:
        """Truncate SQLite's log, which still holds erased pages. False: readers kept it open."""
        if not self.sqlite:
            return True
        self.wal_pending = True
        if self.copying:  # waiting for that reader would block every writer
            return False
        with self._reported():
            connection = self.engine.raw_connection()  # outside of any transaction
            try:
                cursor = connection.cursor()
                cursor.execute(f"PRAGMA busy_timeout = {_TRUNCATE_MILLISECONDS}")
                busy = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                cursor.execute(f"PRAGMA busy_timeout = {1000 * BUSY_SECONDS}")
                cursor.close()  # first, or a backup could get the connection with it still open
                connection.close()
        self.wal_pending = bool(busy)
        return not busy

    def _check_durable(self) -> None:
        if self.sqlite:
            return
        with self.reading() as connection:
            if connection.exec_driver_sql("SHOW fsync").scalar_one() != "on":
                raise DatabaseUnavailable(
                    f"the server of {self._where} runs with fsync=off, so a power cut would lose "
                    "the gallery; switch it on in postgresql.conf"
                )

    def migrate(self) -> None:
        """Bring the tables to the newest revision. Raises GalleryVersion."""
        with self.writing() as connection:
            if _revisions(connection) == [REVISION]:
                return
            from alembic import command  # here: it takes long to import, and is seldom needed
            from alembic.runtime.migration import MigrationContext

            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None and current not in known_revisions():
                raise GalleryVersion(
                    f"the database has schema {current}, which this release does not know; "
                    "use the newer release that wrote it, or restore a backup"
                )
            config = _alembic()
            config.attributes["connection"] = connection
            config.attributes["folder"] = self._folder
            command.upgrade(config, "head")

    @property
    def _where(self) -> str:
        return without_password(self.engine.url)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn the database's errors into the service's."""
        try:
            yield
        except Exception as error:
            explained = self.explained(error)
            if explained is error:
                raise
            raise explained from error

    def explained(self, error: Exception) -> Exception:
        """An error of the database as one of the service's; any other unchanged."""
        # The driver's own errors come from where its cursor is used without SQLAlchemy.
        if not isinstance(error, (SQLAlchemyError, self.engine.dialect.loaded_dbapi.Error)):
            return error
        explained = self._as_service_error(error)
        explained.__cause__ = error
        return explained

    def _as_service_error(self, error: Exception) -> ServiceError:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(error, IntegrityError) and "request_key" in str(cause):
            return IdempotencyConflict(
                "the same Idempotency-Key was enrolled at the same moment; send the request again"
            )
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        state = getattr(cause, "sqlstate", None)
        reason = (str(cause) or type(error).__name__).splitlines()[0]
        if state == _POSTGRES_READ_ONLY:
            return DatabaseUnavailable(
                f"the database {self._where} takes no writes ({reason}): it is a standby, or was "
                "set read-only; name the primary in CMT_DATABASE_URL, or let it be written again"
            )
        if code == _SQLITE_FULL or state == _POSTGRES_DISK_FULL:
            return StorageFull("no space is left for the gallery; free some and send it again")
        if code in (_SQLITE_CORRUPT, _SQLITE_NO_DATABASE):
            return GalleryDamaged(f"the database {self._where} is damaged; restore a backup")
        if code in (_SQLITE_READ_ONLY, _SQLITE_CANNOT_OPEN):
            return StorageUnwritable(
                f"the database {self._where} cannot be written ({cause}); check the path, owner "
                "and mount of the file and its folder"
            )
        if code == _SQLITE_IO_ERROR:
            return DatabaseUnavailable(
                f"the disk under {self._where} reports errors ({cause}); check the disk and its "
                "mount"
            )
        return DatabaseUnavailable(
            f"the database {self._where} does not answer ({reason}); try again later"
        )


def known_revisions() -> set[str]:
    """Revisions of the tables that this release can migrate."""
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()}


def _revisions(connection: Connection) -> list[str]:
    """What Alembic has noted in the database: one revision, none yet, or several by accident."""
    if not inspect(connection).has_table(_NOTED.name):
        return []
    return list(connection.scalars(select(_NOTED.c.version_num)))


def _alembic() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config


def address_of(folder: Path, url: str | None) -> URL:
    """The URL of a gallery's database. Raises DatabaseUnavailable for a URL of another kind.

    A parameter `password_file` of a PostgreSQL URL names the file that holds the password: what
    stands in the environment is shown by many programs.
    """
    if url is None:
        return URL.create("sqlite", database=str(folder / FILE_NAME))
    try:
        address = make_url(url)
    except ArgumentError:
        address = None
    if address is not None:
        if address.drivername == "postgresql+psycopg":
            return _with_password(address)
        name = address.database or ":memory:"
        is_file = not address.query and not name.startswith((":", "file:"))
        if address.drivername == "sqlite" and is_file:
            return address
    raise DatabaseUnavailable(
        "the database URL is none that a gallery can live in; give sqlite:///FILE or "
        "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
    )


def _with_password(address: URL) -> URL:
    """The address with the password that its `password_file` holds, where it has one."""
    file = address.query.get(_PASSWORD_FILE)
    if file is None:
        return address
    if not isinstance(file, str) or address.password:
        raise DatabaseUnavailable(
            f"the database URL has several passwords; give one, or one {_PASSWORD_FILE}"
        )
    try:
        password = Path(file).read_text().strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise DatabaseUnavailable(
            f"the database's password cannot be read from {file} ({reason}); check the file, its "
            "owner and its mode"
        ) from error
    if not password:
        raise DatabaseUnavailable(f"the file {file} holds no password; write the database's there")
    return address.set(password=password).difference_update_query([_PASSWORD_FILE])


def _sqlite_engine(address: URL, connect: Callable[[], sqlite3.Connection]) -> Engine:
    # The connection used last, whose pages are in its cache, is used next.
    engine = create_engine(address, creator=connect, pool_size=_KEPT_OPEN, pool_use_lifo=True)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails where another wrote in between.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgres_engine(address: URL) -> Engine:
    # A lost server is noticed within seconds, and pool_pre_ping replaces connections that broke
    # since their last use. Of several hosts, and after a failover, the one that is written to is
    # taken: a standby may lack what was deleted a moment ago. A prepared statement belongs to a
    # session, which a pooler may change with every transaction.
    usual = {
        "connect_timeout": 10,
        "tcp_user_timeout": 1000 * BUSY_SECONDS,
        "target_session_attrs": "primary",
    }
    try:
        engine = create_engine(
            address,
            pool_pre_ping=True,
            connect_args={
                "prepare_threshold": None,
                **{name: value for name, value in usual.items() if name not in address.query},
            },
        )
    except ModuleNotFoundError as error:
        raise DatabaseUnavailable(
            "a PostgreSQL URL needs the package psycopg; run `pip install 'psycopg[binary]'`"
        ) from error

    @event.listens_for(engine, "checkin")
    def forget(connection: Any, _: Any) -> None:
        # After a transaction that only reads, SQLAlchemy would have the next ones write even where
        # an administrator has set the database read-only.
        if connection is not None and not connection.closed:
            connection.read_only = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("writes", False):
            # Without parameters psycopg sends several statements at once.
            connection.exec_driver_sql(_POSTGRES_WRITES, execution_options={"no_parameters": True})

    return engine
