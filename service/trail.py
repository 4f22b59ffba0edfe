"""What people do with the service, on its way into the gallery's audit log."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from anyio import CapacityLimiter, to_thread

from service.errors import ServiceError
from service.gallery import Act, Gallery

log = logging.getLogger(__name__)

_KEPT = 100_000  # entries that wait for a disk or database that takes them again


class Trail:
    """Writes entries of the audit log in order; those that come together share a transaction.

    An entry that cannot be written, on a full disk or while the database is away, does not stop a
    query: it is kept in memory, counted, and written with the next one that can be.
    """

    def __init__(
        self, gallery: Gallery, limiter: CapacityLimiter, failed: Callable[[], None]
    ) -> None:
        self._gallery, self._limiter, self._failed = gallery, limiter, failed
        self._waiting: deque[Act] = deque()
        self._writing = threading.Lock()

    async def note(self, act: Act) -> None:
        """Log an act: on the disk when this returns, if the disk takes it."""
        self._waiting.append(act)
        await self.flush()

    async def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            await to_thread.run_sync(partial(self._flush), limiter=self._limiter)

    def _flush(self) -> None:
        with self._writing:
            acts = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if not acts:  # another thread took them along
                return
            try:
                self._gallery.record(*acts)
            except ServiceError as error:
                self._failed()
                log.warning("the audit log cannot be written (%s); entries wait", error.detail)
                self._waiting.extendleft(reversed(acts[-_KEPT:]))
                for lost in acts[:-_KEPT]:
                    log.error("audit: %s %s %s", lost.actor, lost.action, lost.subject)
