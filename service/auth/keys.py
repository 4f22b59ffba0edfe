"""API keys: bearer tokens in a file, hashed, each with its scopes.

A key is 32 random bytes, so a plain SHA-256 of it is as safe as a slow password hash. The file is
read again when it changes: a revoked key is refused by the next request, without a restart.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from model.atomic_file import PRIVATE, write_whole
from service.auth.rate_limit import checked_rate
from service.errors import KeysUnreadable

Scope = Literal["query", "enroll", "admin"]


class KeyFileError(Exception):
    """A file of keys that is missing or unreadable; the message says the remedy."""


class Key(BaseModel):
    """One key as it is stored. The key itself is shown only once, when it is created."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str
    scopes: frozenset[Scope]
    sha256: str
    created_at: datetime
    rate: str | None = None
    """Requests that it may make, such as 50/second; None: the setting `rate_limit` applies."""


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key]


class KeyFile:
    """The file of keys: JSON, readable by its owner only, replaced as a whole on every change."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Key]:
        """All keys. Raises KeyFileError."""
        try:
            return _Keys.model_validate_json(self.path.read_bytes()).keys
        except FileNotFoundError as error:
            raise KeyFileError(
                f"there is no file of keys at {self.path}; make one with "
                f"`cmt keys create --file {self.path}`"
            ) from error
        except (OSError, ValidationError) as error:
            raise KeyFileError(
                f"{self.path} is no readable file of keys; restore it, or move it away and make "
                "new keys with `cmt keys create`"
            ) from error

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
    """The keys that the service knows now: those of the file, read again when it changes."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else KeyFile(path)
        self._version: tuple[int, int, int] | None = None
        self._keys: list[Key] = []

    @property
    def open(self) -> bool:
        """Whether no file of keys is configured: everyone on this machine may do everything."""
        return self._file is None

    def find(self, token: str) -> Key | None:
        """The key that `token` is, compared in constant time with every key. None if unknown.

        Raises KeysUnreadable where the file is missing or damaged: every key is refused then.
        """
        digest, found = _digest(token), None
        for key in self._current():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _current(self) -> list[Key]:
        assert self._file is not None
        try:
            status = self._file.path.stat()
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            if version != self._version:
                self._keys, self._version = self._file.read(), version
        except (OSError, KeyFileError) as error:
            raise KeysUnreadable(
                "the file of API keys cannot be read; restore it (CMT_API_KEYS_FILE)"
            ) from error
        return self._keys


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
