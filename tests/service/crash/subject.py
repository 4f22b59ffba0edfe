"""What is killed: a process that serves a gallery, and the sessions that speak to it."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import NamedTuple, Protocol

from PIL import Image
from sqlalchemy import Connection, Engine, event

# Each process starts afresh, but from a server that has imported torch already.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["service.gallery", "service.server"])

TOGETHER = 3  # sessions that work at once
STARTING_SECONDS = 300  # generous: a start takes one second, on a busy machine many


class ProcessGone(Exception):  # noqa: N818 (it is no error: it is what was wanted)
    """The process died before it answered."""


class Listed(NamedTuple):
    """One item as the gallery lists it; key is the number that its crop was made from."""

    item_id: str
    person_id: str
    key: int


class Session(Protocol):
    """One caller. Every method raises ProcessGone where the process dies before it has answered."""

    def add(self, person_id: str, keys: list[int]) -> list[str]:
        """Enroll the crops of these keys in one call → their ids: this is the acknowledgement."""

    def delete(self, item_id: str) -> None: ...

    def erase(self, person_id: str) -> int: ...

    def nearest(self, key: int) -> tuple[str, float]:
        """The first hit of an unmodulated search for the crop of this key, and its distance."""

    def list(self) -> list[Listed]: ...

    def image(self, item_id: str) -> bytes: ...


class Subject(ABC):
    """A process that can be started, spoken to, closed and killed, many times over."""

    most_per_add = 1

    def __init__(self) -> None:
        self._process: BaseProcess | None = None

    @abstractmethod
    def start(self, dies_at_write: int | None) -> None:
        """Begin to start the process; with a number, it kills itself at that write."""

    @abstractmethod
    def sessions(self) -> list[Session]:
        """Wait until it serves → `TOGETHER` sessions. Raises ProcessGone."""

    @abstractmethod
    def begin_close(self) -> None:
        """Ask for an orderly end, which the process then begins."""

    def kill(self) -> None:
        """SIGKILL; nothing where it has ended or never began."""
        if self._process is not None:
            self._process.kill()

    def ended(self, seconds: float = STARTING_SECONDS) -> int:
        """Wait for the process to end → its exit code, negative for a signal."""
        assert self._process is not None
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"the process still runs after {seconds} s"
        return self._process.exitcode


def kill_after(seconds: float, call: Callable[..., object], *arguments: object) -> None:
    """Begin a call in a process of its own, and kill that so many seconds later."""
    begun = CONTEXT.Event()
    process = CONTEXT.Process(target=_begin, args=(begun, call, *arguments))
    process.start()
    assert begun.wait(STARTING_SECONDS), "the process does not start"
    time.sleep(seconds)
    process.kill()
    process.join()


def _begin(begun: Event, call: Callable[..., object], *arguments: object) -> None:
    begun.set()
    call(*arguments)


def crop_bytes(key: int) -> bytes:
    """A picture like no other key's: random colours in coarse blocks, which a network tells apart.

    No two are equal in bytes or in what a network sees.
    """
    blocks = Image.frombytes("RGB", (4, 8), random.Random(key).randbytes(3 * 4 * 8))
    buffer = io.BytesIO()
    blocks.resize((32, 64), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def die_at_write(number: int) -> None:
    """Kill this process at its n-th write from now on: before a statement that writes, or before
    the commit that follows it. The process is then in the middle of a transaction.

    The audit log's entries do not count: queries write them too, also those that verify.
    """
    writes = itertools.count(1)

    def count() -> None:
        if next(writes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def statement(connection: Connection, _cursor: object, sql: str, *_rest: object) -> None:
        if sql.startswith(("INSERT", "UPDATE", "DELETE")) and "INTO audit" not in sql:
            connection.info["wrote"] = True
            count()

    def commit(connection: Connection) -> None:
        if connection.info.pop("wrote", False):  # what only reads commits too
            count()

    event.listen(Engine, "before_cursor_execute", statement)
    event.listen(Engine, "commit", commit)
    event.listen(Engine, "rollback", lambda connection: connection.info.pop("wrote", None))
