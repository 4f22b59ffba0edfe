"""API keys: bearer tokens in a file, hashed, each with its scopes.

A key is 32 random bytes, so a plain SHA-256 of it is as safe as a slow password hash. The file is
read again when it changes: a revoked key is refused by the next request, without a restart.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.atomic_file import PRIVATE, write_whole
from model.strict_json import read_json
from service.auth.rate_limit import checked_rate
from service.errors import KeysUnreadable

Scope = Literal["query", "enroll", "admin"]
Version = tuple[int, int, int, int, int]

MAX_BYTES = 4_000_000  # of a file of keys: more than ten thousand of them

log = logging.getLogger(__name__)


class KeyFileError(Exception):
    """A file of keys that is missing or unreadable; the message says the remedy."""


class Key(BaseModel):
    """One key as it is stored. The key itself is shown only once, when it is created."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str
    scopes: frozenset[Scope]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_at: datetime
    rate: Annotated[str, AfterValidator(checked_rate)] | None = None
    """Requests that it may make, such as 50/second; None: the setting `rate_limit` applies."""


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        """Refuse what would outlive its own revocation."""
        for name in ("id", "sha256"):
            values = [getattr(key, name) for key in self.keys]
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {name}")
        return self


class KeyFile:
    """The file of keys: JSON, readable by its owner only, replaced as a whole on every change."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Key]:
        """All keys. Raises KeyFileError."""
        return self.read_version()[0]

    def read_version(self) -> tuple[list[Key], Version]:
        """All keys, and the version of the file that they are. Raises KeyFileError.

        It waits for nobody: a named pipe or another thing in the file's place is refused.
        """
        try:
            with open(self.path, "rb", opener=_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise self._unreadable("it is no regular file")
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError as error:
            raise KeyFileError(
                f"there is no file of keys at {self.path}; make one with "
                f"`cmt keys create --file {self.path}`"
            ) from error
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        if len(content) > MAX_BYTES:
            raise self._unreadable(f"it has more than {MAX_BYTES:,} bytes")
        return self._parsed(content), version_of(status)

    def _parsed(self, content: bytes) -> list[Key]:
        try:
            read_json(content.decode())
            return _Keys.model_validate_json(content).keys
        except ValidationError as error:
            first = error.errors(include_input=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"]))
            reason = f"{place}: {first['msg']}" if place else first["msg"]
        except ValueError as error:
            reason = str(error)
        raise self._unreadable(reason)

    def _unreadable(self, reason: str) -> KeyFileError:
        return KeyFileError(
            f"{self.path} is no readable file of keys ({reason}); restore it, or move it away and "
            "make new keys with `cmt keys create`"
        )

    def create(
        self, name: str, scopes: Sequence[Scope], rate: str | None = None
    ) -> tuple[Key, str]:
        """Add a key → (what is stored, the key itself). The file is created if it is missing.

        rate: requests that it may make, such as 50/second. Raises KeyFileError for one that is no
        rate.
        """
        if rate is not None:
            try:
                checked_rate(rate)
            except ValueError as error:
                raise KeyFileError(str(error)) from error
        with self._locked():
            keys = self.read() if self.path.exists() else []
            token = f"cmt_{secrets.token_urlsafe(32)}"
            key = Key(
                id=secrets.token_hex(4),
                name=name,
                scopes=frozenset(scopes),
                sha256=_digest(token),
                created_at=datetime.now(UTC),
                rate=rate,
            )
            self._write([*keys, key])
        return key, token

    def revoke(self, key_id: str) -> Key:
        """Remove a key. Raises KeyFileError where there is none with this id."""
        with self._locked():
            keys = self.read()
            for key in keys:
                if key.id == key_id:
                    self._write([other for other in keys if other is not key])
                    return key
        raise KeyFileError(f"{self.path} has no key {key_id!r}; `cmt keys list` shows the ids")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time: otherwise a concurrent change could restore a revoked key."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, keys: list[Key]) -> None:
        write_whole(self.path, _Keys(keys=keys).model_dump_json(indent=2) + "\n", PRIVATE)


class Keyring:
    """The keys that the service knows now: those of the file, read again when it changes.

    While the file is missing or damaged no key is known, not even those that were read before: one
    of them may have been revoked.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else KeyFile(path)
        self._version: Version | None = None
        self._known: list[Key] | KeyFileError = []

    @property
    def open(self) -> bool:
        """Whether no file of keys is configured: everyone on this machine may do everything."""
        return self._file is None

    def find(self, token: str) -> Key | None:
        """The key that `token` is, compared in constant time with every key. None if unknown.

        Raises KeysUnreadable where the file is missing or damaged: every key is refused then.
        """
        digest, found = _digest(token), None
        for key in self._current(self._file):
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def check(self) -> None:
        """Raise KeysUnreadable where there is to be a file of keys and it cannot be read."""
        if self._file is not None:
            self._current(self._file)

    def _current(self, file: KeyFile | None) -> list[Key]:
        assert file is not None
        try:
            version = version_of(file.path.stat())
        except OSError:
            version = None
        if version is None or version != self._version:
            before = self._known
            try:
                self._known, self._version = file.read_version()
            except KeyFileError as error:
                self._known, self._version = error, version
                if str(error) != str(before):
                    log.error("no key is let in: %s", error)
        if isinstance(self._known, KeyFileError):
            raise KeysUnreadable(
                "the file of API keys cannot be read, so that no key is let in; restore it "
                "(CMT_API_KEYS_FILE), the service's log says what is wrong with it"
            ) from self._known
        return self._known


def version_of(status: os.stat_result) -> Version:
    """What changes whenever a file is replaced or written to."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; opening a named pipe would otherwise wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
