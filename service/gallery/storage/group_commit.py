"""Group commit: writes that arrive while others are being synced share the next transaction.

A sync costs milliseconds and covers everything written before it, so one for all waiting writes is
as safe as one for each. No write waits for others to arrive: a lone one commits at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from sqlalchemy import Connection, NestedTransaction
from sqlalchemy.exc import SQLAlchemyError

from service.gallery.storage.database import Database

T = TypeVar("T")
Work = Callable[[Connection], Any]


class GroupCommit:
    """Runs writes on a database. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[tuple[Work, Future[Any]]] = deque()
        self._leading = threading.Lock()

    def run(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction → what it returns, once its writes are on the disk.

        If `work` raises, only its own writes are rolled back and the error is raised here. If the
        transaction fails, every call that shared it raises the same ServiceError, and nothing of
        any of them is stored; only where the connection broke during the commit itself is that
        unknown.
        """
        outcome: Future[T] = Future()
        self._waiting.append((work, outcome))
        with self._leading:
            if not outcome.done():  # otherwise the previous leader has committed it too
                self._commit([self._waiting.popleft() for _ in range(len(self._waiting))])
        return outcome.result()

    def write_row(self, statement: str, row: Mapping[str, Any]) -> bool:
        """Write a row of SQLite at once, as `Database.write_row`; False while others write.

        `run` then shares their next transaction.
        """
        if not self._leading.acquire(blocking=False):
            return False
        try:
            self._database.write_row(statement, row)
        finally:
            self._leading.release()
        return True

    def _commit(self, calls: list[tuple[Work, Future[Any]]]) -> None:
        results: list[tuple[Future[Any], Any]] = []
        try:
            with self._database.writing() as connection:
                for work, outcome in calls:
                    if len(calls) == 1:  # an error takes back the whole transaction
                        results.append((outcome, work(connection)))
                        break
                    savepoint = connection.begin_nested()
                    try:
                        result = work(connection)
                        savepoint.commit()
                    except Exception as error:
                        if not _taken_back(connection, savepoint):
                            raise
                        outcome.set_exception(self._database.explained(error))
                    else:
                        results.append((outcome, result))
        except BaseException as error:
            for _, outcome in calls:
                if not outcome.done():
                    outcome.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            for outcome, result in results:
                outcome.set_result(result)


def _taken_back(connection: Connection, savepoint: NestedTransaction) -> bool:
    """Roll back one call's writes. False: the whole transaction is lost, as on a full disk."""
    try:
        savepoint.rollback()
    except SQLAlchemyError:
        return False
    return not connection.invalidated
