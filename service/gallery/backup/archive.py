"""The file of a backup: a ZIP archive, the same for either database.

    gallery.sqlite3    the tables (without `secrets`) as a compact SQLite database
    audit.key          the key of the audit log's pseudonyms
    manifest.json      `Manifest`, which comes last because it has the SHA-256 of the others

Nothing is compressed: crops are already, and features do not shrink. So a backup is written and
read as a stream, its length is known before, and any ZIP program can open it. This module imports
nothing heavy: clients check with it what they receive.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from pydantic import BaseModel, ConfigDict, ValidationError

from model.strict_json import read_json
from service.errors import BackupInvalid

DATABASE, KEY, MANIFEST = "gallery.sqlite3", "audit.key", "manifest.json"
VERSION = 1
START = b"PK\x03\x04"  # of every backup
KEY_BYTES = 32
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
        for name, source in ((DATABASE, database), (KEY, io.BytesIO(key))):
            digest, size = hashlib.sha256(), 0
            with archive.open(_entry(name, manifest), "w", force_zip64=True) as member:
                while block := source.read(_BLOCK):
                    member.write(block)
                    digest.update(block)
                    size += len(block)
                    yield outlet.take()
            members[name] = Member(size=size, sha256=digest.hexdigest())
        _add_manifest(archive, manifest, members)
    yield outlet.take()


def packed_size(manifest: Manifest, database_size: int) -> int:
    """How many bytes `packed` gives in all.

    A download that says its length cannot be cut off unnoticed, whatever is in between.
    """
    outlet = _Outlet()
    sizes = {DATABASE: database_size, KEY: KEY_BYTES}
    with ZipFile(outlet, "w", ZIP_STORED) as archive:
        for name, size in sizes.items():
            entry = _entry(name, manifest)
            archive.open(entry, "w", force_zip64=True).close()
            entry.file_size = entry.compress_size = size  # as if it had been written
            outlet.skip(size)
        members = {name: Member(size=size, sha256="0" * 64) for name, size in sizes.items()}
        _add_manifest(archive, manifest, members)
    return outlet.tell()


def check(file: BinaryIO, backup: Path) -> None:
    """Check every byte of a backup that was just written, before it gets the name `backup`.

    What its database holds is looked at when it is restored. Raises BackupInvalid.
    """
    file.flush()
    file.seek(0)
    with _archive(backup, file) as archive:
        for name, member in _manifest(backup, archive).members.items():
            for _ in _blocks(backup, archive, name, member):
                pass


def unpack(backup: Path, folder: Path) -> Manifest:
    """Check a backup and write its database and key to `folder`, synced → its manifest.

    Raises BackupInvalid, and OSError where `folder` cannot be written.
    """
    with _opened(backup) as archive:
        manifest = _manifest(backup, archive)
        for name, member in manifest.members.items():
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for block in _blocks(backup, archive, name, member):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
    return manifest


def peek(backup: Path) -> Manifest:
    """A backup's manifest; its other members are not checked. Raises BackupInvalid."""
    with _opened(backup) as archive:
        return _manifest(backup, archive)


def damaged(backup: Path, reason: str) -> BackupInvalid:
    """The error for a backup that is not as it was written."""
    return BackupInvalid(
        f"the backup {backup} is damaged or cut off ({reason}); copy it again, or use another one"
    )


class _Outlet(io.RawIOBase):
    """Buffers what `ZipFile` writes, until `take`."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def skip(self, count: int) -> None:
        """Go on as if so many bytes had been written."""
        self._position += count

    def take(self) -> bytes:
        """What was written since the last call."""
        data = b"".join(self._parts)
        self._parts.clear()
        return data


def _add_manifest(archive: ZipFile, manifest: Manifest, members: Mapping[str, Member]) -> None:
    whole = manifest.model_copy(update={"members": members})
    archive.writestr(_entry(MANIFEST, manifest), whole.model_dump_json(indent=2))


def _entry(name: str, manifest: Manifest) -> ZipInfo:
    # ZIP knows no time before 1980, which a clock without a battery shows.
    entry = ZipInfo(name, max(manifest.created_at.timetuple()[:6], (1980, 1, 1, 0, 0, 0)))
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
    with file, _archive(backup, file) as archive:
        yield archive


@contextmanager
def _archive(backup: Path, file: BinaryIO) -> Iterator[ZipFile]:
    with _judged(backup):
        start = file.read(len(START))
    if start != START:
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
        raise damaged(backup, str(error) or "it ends too early") from error


def _manifest(backup: Path, archive: ZipFile) -> Manifest:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if MANIFEST not in entries:
        raise BackupInvalid(
            f"{backup} is a ZIP file and no backup; give a file that `cmt backup` wrote"
        )
    if entries[MANIFEST].file_size > _MOST_MANIFEST or entries[MANIFEST].compress_type:
        raise damaged(backup, "its manifest is too large or compressed")
    with _judged(backup):
        text = archive.read(MANIFEST)
        said = read_json(text.decode())
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
        raise damaged(backup, "its manifest is incomplete") from error
    if manifest.members.keys() != {DATABASE, KEY} or len(archive.infolist()) != 3:
        raise damaged(backup, "a member is missing or unknown")
    for name, member in manifest.members.items():
        entry = entries.get(name)
        if entry is None:
            raise damaged(backup, f"{name} is missing")
        if entry.compress_type != ZIP_STORED or entry.file_size != member.size:
            raise damaged(backup, f"{name} has another size than its manifest says")
    if manifest.members[KEY].size != KEY_BYTES:
        raise damaged(backup, f"{KEY} has {manifest.members[KEY].size} bytes, not {KEY_BYTES}")
    return manifest


def _blocks(backup: Path, archive: ZipFile, name: str, facts: Member) -> Iterator[bytes]:
    """A member's bytes. Raises BackupInvalid at their end where they are not the manifest's."""
    digest = hashlib.sha256()
    with _judged(backup), archive.open(name) as source:
        while block := source.read(_BLOCK):
            digest.update(block)
            yield block
    if digest.hexdigest() != facts.sha256:
        raise damaged(backup, f"the checksum of {name} is another")
