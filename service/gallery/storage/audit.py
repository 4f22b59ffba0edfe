"""The audit log: who did what to the gallery. Entries are only added, never changed."""

from __future__ import annotations

import errno
import hmac
import json
import logging
import os
import secrets as random_bytes
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, insert, select

from model.atomic_file import sync_folder
from service.errors import GalleryDamaged, StorageFull, StorageUnwritable
from service.gallery.records import AuditEntry, AuditPage
from service.gallery.storage.database import Database
from service.gallery.storage.group_commit import GroupCommit
from service.gallery.storage.rows import cursor_of, number_of_cursor
from service.gallery.storage.tables import audit, secrets
from service.gallery.times import microseconds, moment_of

log = logging.getLogger(__name__)

_COLUMNS = ("moment", "actor", "action", "subject", "details")  # those that are written
_WRITE = f"INSERT INTO audit ({', '.join(_COLUMNS)}) VALUES (:{', :'.join(_COLUMNS)})"

KEY_FILE = "audit.key"
KEY_NAME = "audit"
KEY_BYTES = 32


class Act(NamedTuple):
    """An entry without its number and moment. details must not name a person.

    persons: labels that `Audit.append` writes as pseudonyms among the details.
    """

    actor: str
    action: str
    subject: str | None = None
    details: dict[str, Any] | None = None
    persons: tuple[str, ...] = ()


class Audit:
    """The log of one gallery. Thread-safe.

    Persons appear only under a pseudonym, made with the log's own key: a file of the data folder
    with SQLite, a row of the database on PostgreSQL, where replicas must use the same one. Without
    the key nobody can try out names.
    """

    def __init__(self, database: Database, commits: GroupCommit, folder: Path) -> None:
        self._database, self._commits, self._folder = database, commits, folder
        self._key: bytes | None = None

    def append(self, *acts: Act) -> None:
        """Log acts: on the disk when this returns."""
        entries = [self._without_names(act) for act in acts]
        # A query waits for its entry, whose thread takes turns with the query's own.
        if self._database.sqlite and len(entries) == 1:
            (row,) = _rows(entries)
            if self._commits.write_row(_WRITE, row):
                return
        self._commits.run(lambda connection: write(connection, entries))

    def page(self, limit: int, cursor: str | None = None) -> AuditPage:
        """Entries, newest first. Raises CursorInvalid."""
        query = select(audit).order_by(audit.c.number.desc()).limit(limit + 1)
        if cursor is not None:
            query = query.where(audit.c.number < number_of_cursor(cursor))
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        entries = [
            AuditEntry(
                number=row.number,
                moment=moment_of(row.moment),
                actor=row.actor,
                action=row.action,
                subject=row.subject,
                details=json.loads(row.details),
            )
            for row in rows[:limit]
        ]
        more = len(rows) > limit and bool(entries)
        return AuditPage(entries, cursor_of(entries[-1].number) if more else None)

    def _without_names(self, act: Act) -> Act:
        if not act.persons:
            return act
        pseudonyms = [self.pseudonym(person_id) for person_id in act.persons]
        return act._replace(details={**(act.details or {}), "persons": pseudonyms}, persons=())

    def pseudonym(self, person_id: str) -> str:
        """HMAC-SHA256 of a person's label in hexadecimal: equal labels, equal pseudonyms."""
        return hmac.digest(self.load_key(), person_id.encode(), "sha256").hex()

    def load_key(self) -> bytes:
        """The key of pseudonyms, created when a gallery is first opened.

        A gallery that lost it gets another one, for it must be able to start; the log and an entry
        say so. Raises StorageFull, StorageUnwritable or GalleryDamaged.
        """
        if self._key is None:
            self._key = self._file_key() if self._database.sqlite else self._shared_key()
        return self._key

    def _shared_key(self) -> bytes:
        query = select(secrets.c.data).where(secrets.c.name == KEY_NAME)

        def find_or_make(connection: Connection) -> bytes:
            key = connection.execute(query).scalar_one_or_none()
            if key is None:
                _tell_of_new_key(connection, "the audit log's key in the table secrets")
                key = random_bytes.token_bytes(KEY_BYTES)
                connection.execute(insert(secrets).values(name=KEY_NAME, data=key))
            return bytes(key)

        key = self._commits.run(find_or_make)
        return checked_key(key, "the audit log's key in the table secrets")

    def _file_key(self) -> bytes:
        path = self._folder / KEY_FILE
        try:
            if not path.exists():
                lost = f"the audit log's key {path}"
                self._commits.run(lambda connection: _tell_of_new_key(connection, lost))
                _write_whole(path, random_bytes.token_bytes(KEY_BYTES))
            return read_key(path)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise StorageFull(
                    f"no space is left for the audit log's key {path}; free some and try again"
                ) from error
            raise StorageUnwritable(
                f"the audit log's key {path} cannot be read or made ({error.strerror}); check the "
                "owner and mount of the data folder"
            ) from error


def read_key(path: Path) -> bytes:
    """The key in a file. Raises OSError, and GalleryDamaged for what is none."""
    key = b""
    if path.is_file():  # reading a named pipe would wait for a writer
        with path.open("rb") as file:
            key = file.read(KEY_BYTES + 1)
    return checked_key(key, f"the audit log's key {path}")


def checked_key(key: bytes, what: str) -> bytes:
    """`key`, if one can be that. Raises GalleryDamaged.

    With an empty key, or one of zeros as a file system leaves after a power cut, everybody could
    try out which persons the pseudonyms stand for.
    """
    if len(key) != KEY_BYTES or len(set(key)) == 1:
        raise GalleryDamaged(
            f"{what} is not {KEY_BYTES} random bytes; put it back from a backup, or remove it, and "
            "persons have other pseudonyms from then on"
        )
    return key


def write(connection: Connection, acts: Iterable[Act]) -> None:
    """Log acts in the caller's transaction."""
    if rows := _rows(acts):
        connection.execute(insert(audit), rows)


def _rows(acts: Iterable[Act]) -> list[dict[str, Any]]:
    moment = microseconds(datetime.now(UTC))
    return [
        {
            "moment": moment,
            "actor": act.actor,
            "action": act.action,
            "subject": act.subject,
            "details": json.dumps(act.details or {}),
        }
        for act in acts
    ]


def _tell_of_new_key(connection: Connection, what: str) -> None:
    """Log that a gallery with entries lost its key; a new gallery has none yet."""
    if connection.execute(select(audit.c.number).limit(1)).first() is None:
        return
    log.warning(
        "%s is missing and made anew: the same person has another pseudonym from now on; to "
        "compare with earlier entries, stop the service, put the key back from a backup, and start "
        "again",
        what,
    )
    write(connection, [Act("system", "new_key")])


def _write_whole(path: Path, data: bytes) -> None:
    """Create a private file, complete or absent; an existing one stays."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
        try:
            os.link(file.name, path)
        except FileExistsError:
            return
    sync_folder(path.parent)
