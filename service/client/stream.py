"""Enroll a stream of crops: many in each request, a result for each, in order.

What `Client.enroll_many` and `AsyncClient.enroll_many` share. Memory holds a few requests, however
long the stream is. Each crop goes with an idempotency key, so that a stream which was interrupted
can be sent again from its beginning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from service.api.schemas import BatchAnswer, BatchItem, BatchResult, GalleryItem
from service.client.requests import (
    Call,
    ImageSource,
    ServiceProblem,
    enroll_batch,
    image_bytes,
    parsed,
)

SENDERS = 2  # of each service: one request is sent while it embeds the other's images
PER_REQUEST = 128
_REQUEST_BYTES = 64_000_000

# No other request fares better, now.
_STOPS = frozenset({401, 403, 429, 503, 507})


@dataclass(frozen=True)
class Entry:
    """An image with its labels."""

    image: ImageSource
    item: BatchItem = field(default_factory=BatchItem)


@dataclass(frozen=True)
class EntryResult:
    """What became of an entry: `item`, or the `reason` why it is not enrolled, as a sentence.

    status: 201 new, 200 enrolled before under the same key, or that of the error `code`. Both are
    None where the file could not be read.
    """

    entry: Entry
    item: GalleryItem | None = None
    reason: str | None = None
    status: int | None = None
    code: str | None = None


@dataclass(frozen=True)
class Loaded:
    """An entry whose image was read; `item` has a key."""

    entry: Entry
    image: bytes
    item: BatchItem


class Enrolled(NamedTuple):
    """An entry with the id of its item."""

    entry: Loaded
    item_id: str


class Batcher:
    """Collects entries for requests: few enough for each, and not too large together."""

    def __init__(self, most: int = PER_REQUEST) -> None:
        self._most = most
        self._entries: list[Entry] = []
        self._bytes = 0

    def add(self, entry: Entry) -> list[Entry]:
        """Take one more → those that make up a request without it, or none yet."""
        size = _size(entry.image)
        full = len(self._entries) >= self._most or self._bytes + size > _REQUEST_BYTES
        batch = self.rest() if full else []
        self._entries.append(entry)
        self._bytes += size
        return batch

    def rest(self) -> list[Entry]:
        """Those that make up the last request, perhaps none."""
        batch, self._entries, self._bytes = self._entries, [], 0
        return batch


def batches(entries: Iterable[Entry], most: int) -> Iterator[list[Entry]]:
    """The entries of each request."""
    batcher = Batcher(most)
    for entry in entries:
        if batch := batcher.add(entry):
            yield batch
    if batch := batcher.rest():
        yield batch


async def batches_of_any(
    entries: AsyncIterable[Entry] | Iterable[Entry], most: int
) -> AsyncIterator[list[Entry]]:
    """`batches` of an asynchronous stream or an ordinary one."""
    if not isinstance(entries, AsyncIterable):
        for batch in batches(entries, most):
            yield batch
        return
    batcher = Batcher(most)
    async for entry in entries:
        if batch := batcher.add(entry):
            yield batch
    if batch := batcher.rest():
        yield batch


def window(at_once: int) -> int:
    """How many requests may be begun and not yet taken, where so many are sent at once.

    Answers are given in order: with several services the others go on while one is slow.
    """
    return at_once if at_once <= SENDERS else 2 * at_once


def load(entries: Iterable[Entry]) -> list[Loaded | EntryResult]:
    """Read the images; one that cannot be read has its result already."""
    loaded: list[Loaded | EntryResult] = []
    for entry in entries:
        try:
            data = image_bytes(entry.image)
        except OSError as error:
            loaded.append(EntryResult(entry, reason=error.strerror or str(error)))
        else:
            loaded.append(Loaded(entry, data, with_key(entry, data)))
    return loaded


class Exchange:
    """The requests that enroll some entries, one after the other; whoever sends may wait or not."""

    def __init__(self, entries: Sequence[Loaded | EntryResult]) -> None:
        self._entries = entries
        self._results = {at: one for at, one in enumerate(entries) if isinstance(one, EntryResult)}
        loaded = {at: one for at, one in enumerate(entries) if isinstance(one, Loaded)}
        self._loaded = loaded
        self._waiting = [list(loaded)] if loaded else []

    def next_call(self) -> Call | None:
        """What to send next; None at the end."""
        if not self._waiting:
            return None
        group = [self._loaded[at] for at in self._waiting[-1]]
        return enroll_batch([one.image for one in group], [one.item for one in group])

    def answer(self, response: httpx.Response) -> Enrolled | None:
        """Take the answer to `next_call` → one of the entries that are enrolled by it, if any is.

        Raises Unreachable, and ServiceProblem where all other requests would be refused, too.
        """
        enrolled: Enrolled | None = None
        group = self._waiting.pop()
        try:
            results = parsed(response, BatchAnswer).results
        except ServiceProblem as refusal:
            if refusal.status in _STOPS:
                raise
            if len(group) > 1:  # for its size, for example: what can be enrolled alone is
                self._waiting += [[at] for at in group]
                return None
            results = [BatchResult(status=refusal.status, problem=refusal.problem)]
        for at, result in zip(group, results, strict=True):
            # Not the image's fault, but of the moment, or of the company it came in.
            code = None if result.problem is None else result.problem.code
            if len(group) > 1 and (result.status == 503 or code == "decode_budget_spent"):
                self._waiting.append([at])
                continue
            if result.item is not None:
                enrolled = Enrolled(self._loaded[at], result.item.id)
            reason = None if result.problem is None else result.problem.detail
            self._results[at] = EntryResult(
                self._loaded[at].entry, result.item, reason, result.status, code
            )
        return enrolled

    def results(self) -> list[EntryResult]:
        """What became of each entry, once there is no next call."""
        return [self._results[at] for at in range(len(self._entries))]


def _size(image: ImageSource) -> int:
    if isinstance(image, bytes):
        return len(image)
    try:
        return Path(image).stat().st_size
    except OSError:  # reported when it is read
        return 0


def with_key(entry: Entry, data: bytes) -> BatchItem:
    """The entry's labels with its own key, or one for this file, content and labels.

    The same in every run, so that a repeat enrolls nothing twice.
    """
    if entry.item.key is not None:
        return entry.item
    given = {k: v for k, v in entry.item.model_dump(mode="json").items() if v not in (None, {})}
    image = entry.image
    known: list[Any] = [None if isinstance(image, bytes) else str(Path(image).resolve())]
    known += [given.pop("person_id", None), given.pop("camera_id", None)]
    known.append(given.pop("modality", "auto"))
    if given:
        known.append(given)
    content = hashlib.sha256(data).digest() + json.dumps(known, sort_keys=True).encode()
    return entry.item.model_copy(
        update={"key": f"cmt-enroll-{hashlib.sha256(content).hexdigest()}"}
    )
