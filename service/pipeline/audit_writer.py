"""Entries of requests on their way into the gallery's audit log."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from service.errors import ServiceError
from service.gallery import Act, Gallery
from service.kit.concurrency import in_thread

log = logging.getLogger(__name__)

_KEPT = 100_000  # entries that wait while the disk or database takes none


class AuditWriter:
    """Writes entries of the audit log in order; those that come together share a transaction.

    An entry that cannot be written, on a full disk or while the database is away, does not stop a
    query: it is kept in memory, counted, and written with the next one that can be.
    """

    def __init__(self, gallery: Gallery, failed: Callable[[], None]) -> None:
        self._gallery, self._failed = gallery, failed
        self._thread = ThreadPoolExecutor(1, "audit")
        self._waiting: deque[Act] = deque()

    async def note(self, act: Act) -> None:
        """Log an act: on the disk when this returns, if it can be written."""
        self._waiting.append(act)
        await self.flush()

    def post(self, act: Act) -> Future[None]:
        """Log an act soon, from any thread → what is done once it is on the disk, if it can be."""
        self._waiting.append(act)
        return self._thread.submit(self._flush)

    async def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            await in_thread(self._thread, self._flush)

    def close(self) -> None:
        """Write what waits, if that is possible, and end the thread."""
        self._thread.submit(self._flush)
        self._thread.shutdown()

    def _flush(self) -> None:
        acts = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not acts:  # the previous call wrote them too
            return
        try:
            self._gallery.record(*acts)
        except ServiceError as error:
            self._failed()
            log.warning("the audit log cannot be written (%s); entries wait", error.detail)
            self._waiting.extendleft(reversed(acts[-_KEPT:]))
            for lost in acts[:-_KEPT]:
                log.error("audit: %s %s %s", lost.actor, lost.action, lost.subject)
