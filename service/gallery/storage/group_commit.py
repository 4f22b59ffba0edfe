"""Group commit: writes that arrive while others are being synced share the next transaction.

A sync costs milliseconds and takes along whatever was written before it, so one for all that wait
is as safe as one for each. Nobody waits for company: a lone write commits at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
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
        """What `work` returns, once its writes are on the disk.

        Should `work` raise, its own writes alone are taken back and the error is raised here.
        Should the transaction fail, every call that shared it raises the same ServiceError, and
        nothing of any of them is stored; only where the connection broke during the commit itself
        nobody can know.
        """
        outcome: Future[T] = Future()
        self._waiting.append((work, outcome))
        with self._leading:
            if not outcome.done():  # else the thread that led before has taken it along
                self._commit([self._waiting.popleft() for _ in range(len(self._waiting))])
        return outcome.result()

    def _commit(self, calls: list[tuple[Work, Future[Any]]]) -> None:
        results: list[tuple[Future[Any], Any]] = []
        try:
            with self._database.writing() as connection:
                for work, outcome in calls:
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
    """Undo one call's writes. False: the whole transaction is gone, as on a full disk."""
    try:
        savepoint.rollback()
    except SQLAlchemyError:
        return False
    return not connection.invalidated
