"""Embedding the gallery again while the service runs, and the switch to the other checkpoint."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass, replace
from typing import Literal

from anyio import to_thread

from model import CheckpointError
from service.embedding.embedder import Embedder
from service.errors import CheckpointUnusable, ModelVersionConflict, ServiceError
from service.gallery import Act, Progress, ReembeddingStopped
from service.kit.device_loss import LOST, report_loss
from service.pipeline.pipeline import Pipeline
from service.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """Progress of a run.

    checkpoint: fingerprint of the one that embeds. done of total items have its features. detail:
    why it failed or stopped.
    """

    state: Literal["idle", "running", "done", "failed"] = "idle"
    checkpoint: str | None = None
    done: int = 0
    total: int = 0
    detail: str | None = None


class ReembeddingJob:
    """Embeds the gallery again in a thread, one run at a time.

    Finished work is in the gallery: a run after a restart continues from there.
    """

    def __init__(self, pipeline: Pipeline, settings: Settings) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._stop = threading.Event()
        self._running = threading.Lock()
        self._thread: threading.Thread | None = None
        self.status = Status()

    async def start(self, name: str | None, actor: str) -> Status:
        """Begin a run with the checkpoint file `name` beside the one in use, or with that one.

        Raises ModelVersionConflict while another runs, CheckpointUnusable for a file that is no
        checkpoint.
        """
        if not self._running.acquire(blocking=False):
            raise ModelVersionConflict(
                "the gallery is being embedded again already; GET /admin/reembed says how far it is"
            )
        try:
            embedder = self._pipeline.engine.embedder
            if name is not None:
                embedder = await to_thread.run_sync(self._load, name)
            fingerprint = embedder.info.fingerprint
            await self._pipeline.audit_writer.note(Act(actor, "reembed", fingerprint))
            self.status = Status("running", fingerprint)
            loop = asyncio.get_running_loop()
            arguments = (embedder, loop, actor)
            self._thread = threading.Thread(target=self._run, args=arguments, name="reembed")
            self._thread.start()
        except BaseException:
            self._running.release()
            raise
        return self.status

    def close(self) -> None:
        """Stop a run, and wait for its end."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, embedder: Embedder, loop: asyncio.AbstractEventLoop, actor: str) -> None:
        try:
            self._pipeline.gallery.reembed(
                embedder.info,
                embedder.embed,
                decode=self._pipeline.decode_stored,
                switched=lambda: self._switched(embedder, loop),
                progress=self._progress,
                stop=self._stop,
                actor=actor,
            )
            self.status = replace(self.status, state="done")
        except ReembeddingStopped:
            self.status = replace(
                self.status, state="idle", detail="stopped; the next one goes on from there"
            )
        except ServiceError as error:
            log.error("embedding the gallery again failed: %s", error.detail)
            self.status = replace(self.status, state="failed", detail=error.detail)
        except Exception as error:
            detail = "a defect; the service's log has the details"
            if report_loss(error):
                detail = LOST
            else:
                log.exception("embedding the gallery again failed")
            self.status = replace(self.status, state="failed", detail=detail)
        finally:
            self._running.release()

    def _switched(self, embedder: Embedder, loop: asyncio.AbstractEventLoop) -> None:
        if embedder is not self._pipeline.engine.embedder:
            loop.call_soon_threadsafe(self._pipeline.switch, embedder)

    def _progress(self, progress: Progress) -> None:
        self.status = replace(self.status, done=progress.done, total=progress.total)

    def _load(self, name: str) -> Embedder:
        settings = self._settings
        try:
            return Embedder(
                settings.checkpoint.parent / name,
                device=settings.device,
                runtime=settings.runtime,
                cache_dir=settings.data_dir / "cache",
            )
        except CheckpointError as error:
            raise CheckpointUnusable(f"{error}; the one in use goes on") from error
