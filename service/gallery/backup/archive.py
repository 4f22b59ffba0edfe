"""The file of a backup: a ZIP archive, the same for either database.

    gallery.sqlite3    the tables (without `secrets`) as a compact SQLite database
    audit.key          the key of the audit log's pseudonyms
    manifest.json      `Manifest`, which comes last because it has the SHA-256 of the others

Nothing is compressed: crops are already, and features do not shrink. So a backup is written and
read as a stream, and any ZIP program can open it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from pydantic import BaseModel, ConfigDict, ValidationError

from service.errors import BackupInvalid
from service.gallery.storage.audit import KEY_FILE
from service.gallery.storage.database import FILE_NAME
from service.gallery.storage.tables import AUDIT_TRIGGERS

MANIFEST = "manifest.json"
VERSION = 1
_BLOCK = 1 << 20
_MOST_MANIFEST = 1 << 20  # bytes, so that a file of another kind cannot fill the memory
# What the module zipfile raises for damaged bytes.
_DAMAGE = (BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)


class Member(BaseModel):
    """Size in bytes and SHA-256 of one of the other files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """A backup's description of itself.

    revision: of the tables. active: fingerprint of the model version in use, None where there never
    was one. counts: rows of each table. members: the other files, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["cmt-backup"] = "cmt-backup"
    version: int = VERSION
    created_at: datetime
    revision: str
    active: str | None
    counts: dict[str, int]
    members: dict[str, Member] = {}


def packed(manifest: Manifest, database: BinaryIO, key: bytes) -> Iterator[bytes]:
    """The archive in blocks of about 1 MB; `manifest` is completed with its members."""
    outlet = _Outlet()
    members: dict[str, Member] = {}
    with ZipFile(outlet, "w", ZIP_STORED) as archive:
        for name, source in ((FILE_NAME, database), (KEY_FILE, io.BytesIO(key))):
            digest, size = hashlib.sha256(), 0
            with archive.open(_entry(name, manifest), "w", force_zip64=True) as member:
                while block := source.read(_BLOCK):
                    member.write(block)
                    digest.update(block)
                    size += len(block)
                    yield outlet.take()
            members[name] = Member(size=size, sha256=digest.hexdigest())
        whole = manifest.model_copy(update={"members": members})
        archive.writestr(_entry(MANIFEST, manifest), whole.model_dump_json(indent=2))
    yield outlet.take()


def unpack(backup: Path, folder: Path) -> Manifest:
    """Check a backup and write its database and key to `folder`, synced → its manifest.

    Raises BackupInvalid, and OSError where `folder` cannot be written.
    """
    with _opened(backup) as archive:
        manifest = _manifest(backup, archive)
        for name, member in manifest.members.items():
            _extract(backup, archive, name, member, folder / name)
    try:
        found = described(folder / FILE_NAME, manifest.created_at)
    except (sqlite3.Error, ValidationError) as error:
        raise _damaged(backup, "its database is none of a gallery") from error
    if found != manifest.model_copy(update={"members": {}}):
        raise _damaged(backup, "its database is another than its manifest says")
    return manifest


def peek(backup: Path) -> Manifest:
    """A backup's manifest; its other members are not checked. Raises BackupInvalid."""
    with _opened(backup) as archive:
        return _manifest(backup, archive)


def described(database: Path, created_at: datetime) -> Manifest:
    """The manifest of a copy, without its members. Raises sqlite3.Error."""
    with closing(read_only(database)) as connection:
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        if not all(_is_ours(*row) for row in rows):
            raise sqlite3.DatabaseError("it has more than tables, indexes and their triggers")
        names = {name for kind, name, _ in rows if kind == "table" and name.isidentifier()}
        names -= {"alembic_version", "secrets", "sqlite_sequence"}

        def first(statement: str) -> Any:
            row = connection.execute(statement).fetchone()
            return None if row is None else row[0]

        return Manifest(
            created_at=created_at,
            revision=str(first("SELECT version_num FROM alembic_version")),
            active=first("SELECT fingerprint FROM models WHERE state = 'active'"),
            counts={name: first(f"SELECT count(*) FROM {name}") for name in sorted(names)},
        )


def _is_ours(kind: str, name: str, sql: str | None) -> bool:
    """Whether a part of a database is one that a gallery has; a view or a trigger may run SQL."""
    if kind == "trigger":
        return AUDIT_TRIGGERS.get(name) == sql
    return kind in ("table", "index") and "VIRTUAL" not in (sql or "")


def read_only(database: Path) -> sqlite3.Connection:
    """A connection that creates no file next to the database."""
    return sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)


class _Outlet(io.RawIOBase):
    """Buffers what `ZipFile` writes, until `take`."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """What was written since the last call."""
        data = b"".join(self._parts)
        self._parts.clear()
        return data


def _entry(name: str, manifest: Manifest) -> ZipInfo:
    entry = ZipInfo(name, manifest.created_at.timetuple()[:6])
    entry.external_attr = 0o600 << 16  # unpacked files are private
    return entry


@contextmanager
def _opened(backup: Path) -> Iterator[ZipFile]:
    try:
        file = backup.open("rb")
    except OSError as error:
        raise BackupInvalid(
            f"the backup {backup} cannot be read ({error.strerror}); check the path"
        ) from error
    with file:
        if file.read(4) != b"PK\x03\x04":
            raise BackupInvalid(f"{backup} is no backup; give a file that `cmt backup` wrote")
        with _judged(backup):
            archive = ZipFile(file)
        yield archive


@contextmanager
def _judged(backup: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackupInvalid(f"the backup {backup} cannot be read ({error})") from error
    except _DAMAGE as error:
        raise _damaged(backup, str(error) or "it ends too early") from error


def _manifest(backup: Path, archive: ZipFile) -> Manifest:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if MANIFEST not in entries:
        raise BackupInvalid(
            f"{backup} is a ZIP file and no backup; give a file that `cmt backup` wrote"
        )
    if entries[MANIFEST].file_size > _MOST_MANIFEST or entries[MANIFEST].compress_type:
        raise _damaged(backup, "its manifest is too large or compressed")
    with _judged(backup):
        text = archive.read(MANIFEST)
        said = json.loads(text)
    if not isinstance(said, dict) or said.get("format") != "cmt-backup":
        raise BackupInvalid(f"{backup} is no backup; give a file that `cmt backup` wrote")
    if isinstance(said.get("version"), int) and said["version"] > VERSION:
        raise BackupInvalid(
            f"{backup} has format {said['version']} and this release reads {VERSION}; restore it "
            "with the newer release that wrote it"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise _damaged(backup, "its manifest is incomplete") from error
    if manifest.members.keys() != {FILE_NAME, KEY_FILE} or len(archive.infolist()) != 3:
        raise _damaged(backup, "a member is missing or unknown")
    for name, member in manifest.members.items():
        entry = entries.get(name)
        if entry is None:
            raise _damaged(backup, f"{name} is missing")
        if entry.compress_type != ZIP_STORED or entry.file_size != member.size:
            raise _damaged(backup, f"{name} has another size than its manifest says")
    return manifest


def _extract(backup: Path, archive: ZipFile, name: str, member: Member, target: Path) -> None:
    digest = hashlib.sha256()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for block in _blocks(backup, archive, name):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != member.sha256:
        raise _damaged(backup, f"the checksum of {name} is another")


def _blocks(backup: Path, archive: ZipFile, name: str) -> Iterator[bytes]:
    with _judged(backup), archive.open(name) as source:
        while block := source.read(_BLOCK):
            yield block


def _damaged(backup: Path, reason: str) -> BackupInvalid:
    return BackupInvalid(
        f"the backup {backup} is damaged or cut off ({reason}); copy it again, or use another one"
    )
