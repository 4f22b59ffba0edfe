"""The database behind a gallery: connections, migrations, and its errors as sentences."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from service.errors import (
    DatabaseUnavailable,
    GalleryDamaged,
    GalleryVersion,
    IdempotencyConflict,
    ServiceError,
    StorageFull,
)

FILE_NAME = "gallery.sqlite3"
_MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 30
_POSTGRES_DISK_FULL = "53100"
# SQLite's primary result codes (the low byte of the extended ones).
_SQLITE_IO_ERROR, _SQLITE_CORRUPT, _SQLITE_FULL, _SQLITE_NO_DATABASE = 10, 11, 13, 26


def connect(folder: Path, url: str | None) -> Engine:
    """An engine on `url`, or on the SQLite file of the data folder. Opens nothing yet."""
    if url is not None:
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(
        f"sqlite:///{folder / FILE_NAME}", connect_args={"timeout": BUSY_SECONDS}
    )
    event.listen(engine, "connect", _set_pragmas)
    return engine


def migrate(engine: Engine) -> None:
    """Bring the tables to this release's form. GalleryVersion: a newer release wrote them."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with reported(engine), engine.begin() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in known:
            raise GalleryVersion(
                f"the database has schema {current}, which this release does not know; "
                "use the newer release that wrote it, or restore a backup"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def reported(engine: Engine) -> Iterator[None]:
    """Turn the database's errors into the service's."""
    try:
        yield
    except SQLAlchemyError as error:
        raise _as_service_error(engine, error) from error


def _set_pragmas(connection: sqlite3.Connection, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")  # readers go on while a writer commits
    cursor.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
    cursor.execute("PRAGMA secure_delete = ON")  # deleted pages are overwritten with zeros
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _as_service_error(engine: Engine, error: SQLAlchemyError) -> ServiceError:
    cause = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(error, IntegrityError) and "request_key" in str(cause):
        return IdempotencyConflict(
            "the same Idempotency-Key was enrolled at the same moment; send the request again"
        )
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    if code == _SQLITE_FULL or getattr(cause, "sqlstate", None) == _POSTGRES_DISK_FULL:
        return StorageFull("no space is left for the gallery; free some and send it again")
    where = engine.url.render_as_string(hide_password=True)
    if code in (_SQLITE_CORRUPT, _SQLITE_NO_DATABASE):
        return GalleryDamaged(f"the database {where} is damaged; restore a backup")
    if code == _SQLITE_IO_ERROR:
        return DatabaseUnavailable(
            f"the disk under {where} reports errors ({cause}); check the disk and its mount"
        )
    reason = str(cause or error).splitlines()[0] if str(cause or error) else type(error).__name__
    return DatabaseUnavailable(f"the database {where} does not answer ({reason}); try again later")
