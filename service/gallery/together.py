"""Calls of several threads run as one: whoever comes first works for all that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class _Place(Generic[Request, Result]):
    """A thread's call in the queue; `turn` is set when it is answered or has to lead."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.turn = threading.Event()
        self.result: Result | None = None
        self.error: BaseException | None = None


class Together(Generic[Request, Result]):
    """`run`, a function of many requests, called as a function of one from many threads.

    A lone call runs at once, on its own thread. Calls that come meanwhile queue; the first of them
    then runs all of them as one batch of at most `largest`. Nobody waits for a batch to fill.
    """

    def __init__(
        self, run: Callable[[Sequence[Request]], Sequence[Result]], largest: int = 64
    ) -> None:
        self._run, self._largest = run, largest
        self._lock = threading.Lock()
        self._queue: list[_Place[Request, Result]] = []
        self._led = False

    def __call__(self, request: Request) -> Result:
        """The request's result, or the exception that it raises when it runs alone."""
        mine: _Place[Request, Result] = _Place(request)
        with self._lock:
            self._queue.append(mine)
            waits, self._led = self._led, True
        if waits:
            mine.turn.wait()
        if mine.result is None and mine.error is None:
            self._lead()
        if mine.error is not None:
            raise mine.error
        assert mine.result is not None
        return mine.result

    def _lead(self) -> None:
        with self._lock:
            batch = self._queue[: self._largest]
            del self._queue[: self._largest]
        try:
            self._answer(batch)
        finally:
            with self._lock:
                if self._queue:
                    self._queue[0].turn.set()
                else:
                    self._led = False
            for place in batch:
                place.turn.set()

    def _answer(self, batch: Sequence[_Place[Request, Result]]) -> None:
        try:
            results = self._run([place.request for place in batch])
            for place, result in zip(batch, results, strict=True):
                place.result = result
        except BaseException as error:
            if len(batch) == 1:
                batch[0].error = error
                return
            for place in batch:
                place.result = None
                self._answer([place])
