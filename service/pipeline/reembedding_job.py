"""Embedding the gallery again while the service runs, and the switch to the other checkpoint."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass, replace
from typing import Literal

from anyio import sleep, to_thread

from model import CheckpointError
from model.stored_fingerprint import stored_fingerprint
from service.embedding.embedder import Embedder
from service.errors import CheckpointUnusable, ModelVersionConflict, ServiceError
from service.gallery import Act, Progress, ReembeddingStopped
from service.kit.device_loss import LOST, report_loss
from service.pipeline.pipeline import Pipeline
from service.settings import Settings

log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between two looks at what the other replicas do
_REST = 5.0  # after one that failed


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
        self._prepared: Embedder | None = None  # of a run of another replica
        self.status = Status()

    async def current(self) -> Status:
        """How far the newest run is, whichever replica has it."""
        run = await self._pipeline.stored(self._pipeline.gallery.run)
        if run is None or run.mine:
            return self.status
        known = {"state", "checkpoint", "done", "total", "detail"}
        return Status(**{name: value for name, value in run.details.items() if name in known})

    async def follow(self) -> None:
        """Follow the other replicas to the checkpoint that they have gone on to, until cancelled.

        Its network is loaded as soon as one of them embeds with it. The leader also goes on with a
        run whose replica has ended.
        """
        replicas = self._pipeline.gallery.replicas
        told = ""  # what goes on failing is said once
        while replicas is not None:
            await sleep(_LOOK)
            if self._running.locked():
                continue
            run, successor = replicas.run_elsewhere, replicas.successor
            try:
                if successor is not None:
                    await self._adopt(await self._loaded(successor))
                elif run is None:
                    self._prepared = None
                elif run.alive:
                    self._prepared = await self._loaded(run.details["checkpoint"])
                elif replicas.leads:
                    name = await to_thread.run_sync(self._file_of, run.details["checkpoint"])
                    await self.start(name, run.details["actor"])
                told = ""
            except ServiceError as error:
                if error.detail != told:
                    log.error("the other replicas cannot be followed: %s", error.detail)
                told = error.detail
                await sleep(_REST)
            except Exception as error:
                if report_loss(error):
                    return
                log.exception("the other replicas cannot be followed")
                await sleep(_REST)

    async def _loaded(self, fingerprint: str) -> Embedder:
        """The network of this checkpoint. Raises CheckpointUnusable where no file has it."""
        for embedder in (self._pipeline.engine.embedder, self._prepared):
            if embedder is not None and embedder.info.fingerprint == fingerprint:
                return embedder
        name = await to_thread.run_sync(self._file_of, fingerprint)
        return await to_thread.run_sync(self._load, name)

    async def _adopt(self, embedder: Embedder) -> None:
        """Embed and search with this checkpoint from now on."""
        await to_thread.run_sync(self._pipeline.gallery.adopt, embedder.info)
        self._prepared = None
        if embedder is not self._pipeline.engine.embedder:
            self._pipeline.switch(embedder)
        log.info("this replica has followed the gallery to %s", embedder.info.fingerprint[:12])

    def _file_of(self, fingerprint: str) -> str:
        """The name of the file beside the one in use that has this checkpoint."""
        for path in sorted(self._settings.checkpoint.parent.glob("*.safetensors")):
            if stored_fingerprint(path) == fingerprint:
                return path.name
        raise CheckpointUnusable(
            f"the gallery goes on to the checkpoint {fingerprint[:12]}, and no file beside "
            f"{self._settings.checkpoint} has it; put it there"
        )

    async def start(self, name: str | None, actor: str) -> Status:
        """Begin a run with the checkpoint file `name` beside the one in use, or with that one.

        Raises ModelVersionConflict while another runs, CheckpointUnusable for a file that is no
        checkpoint.
        """
        run = await self._pipeline.stored(self._pipeline.gallery.run)
        elsewhere = run is not None and run.alive and not run.mine
        if elsewhere or not self._running.acquire(blocking=False):
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
