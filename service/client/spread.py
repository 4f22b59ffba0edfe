"""Which of several services of one gallery takes the next request of a stream.

The one with the fewest on their way does. One that gives no answer, or stays busy, rests while
another takes what it was sent, which the keys of the crops make harmless. Nothing here sends or
waits: `Spread.enroll` says what to send, and each client does it in its own way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Generator, Sequence
from typing import Generic, NamedTuple, TypeVar

import httpx

from service.api.schemas import BatchAnswer
from service.client.requests import Call, Unreachable, enroll_batch, item_path, parsed
from service.client.stream import Enrolled, EntryResult, Exchange, Loaded

S = TypeVar("S")
T = TypeVar("T")

PATIENCE = 20  # times the retries of a single request: a stream makes a service busy by itself
# Seconds until a service that did not answer is asked again, while others do; twice as many each
# time, up to so many.
_REST, _LONGEST_REST = 10.0, 80.0
# While others are left to ask, a service is waited for so many times as long as the longest answer
# took, and so many seconds at least: one that is stopped would hold up the whole stream.
_SLOWER, _LEAST_WAIT = 5.0, 15.0
_CONNECT = 5.0
_BUSY = frozenset({429, 503})
_ELSEWHERE = _BUSY | {502, 504}  # as a proxy answers for a service that has ended


class OtherGallery(Exception):  # noqa: N818 (what it is, as the other errors of the client)
    """Two of the services do not have the same gallery; the message says which."""


class Step(NamedTuple, Generic[S]):
    """A request to send next. patience: times the usual retries."""

    service: S
    call: Call
    patience: int


Steps = Generator[Step[S], httpx.Response, T]
"""Gives what to send next; takes the answer, or Unreachable thrown into it."""


class Spread(Generic[S]):
    """The services of one gallery, each with its address. Thread-safe.

    Before a further one is used, it must know what another has just enrolled: services of two
    galleries would get half of the crops each.
    """

    def __init__(self, services: Sequence[tuple[str, S]]) -> None:
        self._services = services
        self._alone = len(services) == 1
        self._lock = threading.Lock()
        self._on_way = [0] * len(services)
        self._rests_until = [0.0] * len(services)
        self._rests = [_REST] * len(services)
        self._longest: float | None = None  # seconds that an answer took
        self._enrolled: tuple[int, Enrolled] | None = None  # by whom, and what
        self._one_gallery: set[int] = set()

    def enroll(self, entries: Sequence[Loaded | EntryResult]) -> Steps[S, list[EntryResult]]:
        """The requests that enroll some entries → what became of each.

        Raises as `Exchange.answer`, Unreachable where no service answers, and OtherGallery.
        """
        exchange = Exchange(entries)
        while (call := exchange.next_call()) is not None:
            place, response = yield from self._answered(call)
            enrolled = exchange.answer(response)
            if enrolled is None or self._alone:
                continue
            if self._enrolled is None:
                self._one_gallery.add(place)
            if place in self._one_gallery:
                self._enrolled = place, enrolled
        return exchange.results()

    def _answered(self, call: Call) -> Steps[S, tuple[int, httpx.Response]]:
        """The answer of the first service that has one, and its place."""
        for _ in range(1 if self._alone else PATIENCE):
            asked: set[int] = set()
            busy: list[tuple[int, httpx.Response]] = []
            silent: list[Unreachable] = []
            while (place := self._take(asked)) is not None:
                asked.add(place)
                try:
                    response = yield from self._compared(place)
                    if response is None:
                        more_left = len(asked) < len(self._services)
                        response = yield from self._sent(place, call, more_left=more_left)
                except Unreachable as error:
                    silent.append(error)
                else:
                    if self._alone or response.status_code not in _ELSEWHERE:
                        self._rests_until[place], self._rests[place] = 0.0, _REST
                        return place, response
                    busy.append((place, response))
                finally:
                    with self._lock:
                        self._on_way[place] -= 1
                self._rests_until[place] = time.monotonic() + self._rests[place]
                self._rests[place] = min(2 * self._rests[place], _LONGEST_REST)
            if not busy:
                raise silent[0]
            if not any(answer.status_code in _BUSY for _, answer in busy):
                break
        return busy[-1]

    def _sent(self, place: int, call: Call, *, more_left: bool) -> Steps[S, httpx.Response]:
        """The answer of one service. more_left: others can be asked if it takes too long."""
        if more_left and self._longest is not None:
            seconds = max(_LEAST_WAIT, _SLOWER * self._longest)
            call = call._replace(timeout=httpx.Timeout(seconds, connect=_CONNECT))
        began = time.monotonic()
        response = yield Step(self._services[place][1], call, PATIENCE if self._alone else 1)
        self._longest = max(self._longest or 0.0, time.monotonic() - began)
        return response

    def _take(self, asked: Collection[int]) -> int | None:
        """The place of the service to ask next: one that does not rest, if possible."""
        now = time.monotonic()
        with self._lock:
            left = [place for place in range(len(self._services)) if place not in asked]
            if not left:
                return None
            load = self._on_way if self._enrolled else range(len(self._services))  # at first one
            place = min(left, key=lambda at: (self._rests_until[at] > now, load[at]))
            self._on_way[place] += 1
            return place

    def _compared(self, place: int) -> Steps[S, httpx.Response | None]:
        """Have a service repeat what another enrolled → its answer if it is none for now.

        Raises OtherGallery where that is another item there.
        """
        if self._enrolled is None or place in self._one_gallery:
            return None
        other, (known, item_id) = self._enrolled
        address, service = self._services[place]
        again = enroll_batch([known.image], [known.item])
        response = yield from self._sent(place, again, more_left=True)
        if response.status_code in _ELSEWHERE:
            return response
        [result] = parsed(response, BatchAnswer).results
        if result.item is None:
            return None
        # By its id: another thread may have it repeated there at the same moment.
        if result.item.id != item_id:
            if result.status == 201:  # and not there before
                yield Step(service, Call("DELETE", item_path(result.item.id)), 1)
            raise OtherGallery(
                f"{address} does not know what {self._services[other][0]} has enrolled; name only "
                "services of one gallery, which share a database"
            )
        self._one_gallery.add(place)
        return None
