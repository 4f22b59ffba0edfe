"""The decoding processes, and the service's end of their sockets."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from socket import socketpair
from typing import Any, Literal

import numpy as np

from service.errors import (
    DecodeBudgetSpent,
    ImageUndecodable,
    MemoryExhausted,
    RuntimeUnavailable,
    error_of,
)
from service.images.decode import Crop, ImageLimits, Picture
from service.images.protocol import FACTS, READY, Order, Wire
from service.images.turns import Share, Turns

log = logging.getLogger(__name__)

# An image's limit is computing time. On a machine with other work to do it waits besides; what is
# not answered by then does not wait for the image's sake.
_PATIENCE = 3
_GRACE = 2.0  # seconds beyond
_START = 60.0  # seconds that a process may take to start
_TRIES = 2  # deaths of one cause until the image is given up
_RETRY_AFTER = 5

# What an image can do to its process. Other signals come from outside: SIGKILL is the kernel's,
# when memory runs out, or an operator's. More memory than a process may have is none of them: the
# codec is refused it, and says so.
_CRASHES = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSYS,
    signal.SIGTRAP,
}


@dataclass(eq=False)
class _Job:
    picture: Picture
    height: int
    width: int
    limits: ImageLimits
    answer: Future[Crop] = field(default_factory=Future)


class Decoders:
    """`count` processes that decode one image each at a time. Thread-safe.

    seconds: of computing that one image may take. keep_metadata: whether what is stored keeps EXIF
    and the like.
    """

    def __init__(
        self, count: int, limits: ImageLimits, *, seconds: float, keep_metadata: bool = False
    ) -> None:
        self._limits, self._seconds, self._keep_metadata = limits, seconds, keep_metadata
        self._turns: Turns[_Job] = Turns(count)
        self._closing = False
        self._all = [_Worker() for _ in range(count)]
        for worker in self._all:
            worker.start()
        # The last one used is the next: its memory is in the processor's caches.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._all:
            self._idle.put(worker)
        self._threads = [
            threading.Thread(target=self._serve, name="decode", daemon=True) for _ in self._all
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        picture: Picture,
        height: int,
        width: int,
        share: Share,
        limits: ImageLimits | None = None,
    ) -> Future[Crop]:
        """Decode one upload, once it is its turn. Cancelled before that, it is never decoded.

        height, width: of the network's input. The crop's picture has that size, so that what waits
        for the network is small however large the upload was. share: of its request. limits:
        instead of the pool's. The future raises ServiceError of status 413, 415 or 422 for what is
        wrong with the image; MemoryExhausted where its process is killed from outside, again and
        again; RuntimeUnavailable where no process starts.
        """
        job = _Job(picture, height, width, limits or self._limits)
        self._turns.put(share, job)
        job.answer.add_done_callback(
            lambda answer: self._turns.remove(share, job) if answer.cancelled() else None
        )
        return job.answer

    def decode(
        self, picture: Picture, height: int, width: int, limits: ImageLimits | None = None
    ) -> Crop:
        """Decode one upload of nobody's request, waiting for its turn. See `submit`."""
        return self.submit(picture, height, width, Share(""), limits).result()

    def decode_at_once(
        self, picture: Picture, height: int, width: int, share: Share
    ) -> Crop | None:
        """The same for a request, in the calling thread; None where it would have to wait."""
        if not self._turns.take(share):
            return None
        job = _Job(picture, height, width, self._limits)
        self._serve_one(share, job)
        return job.answer.result()

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that run."""
        return [worker.process.pid for worker in self._all if worker.process is not None]

    def close(self) -> None:
        """End all processes. What still waits is answered with RuntimeUnavailable."""
        self._closing = True
        for job in self._turns.close():
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(_ending())
        for worker in self._all:
            worker.stop()
        for thread in self._threads:
            thread.join()
        for _ in self._all:
            self._idle.get().kill()

    def _serve(self) -> None:
        """Decode what is next, until closed."""
        while (found := self._turns.get()) is not None:
            self._serve_one(*found)
            del found  # while waiting for the next one, nothing is held

    def _serve_one(self, share: Share, job: _Job) -> None:
        """Decode one image, which has a place, so that one of the processes is idle."""
        worker, used = self._idle.get(), 0.0
        try:
            used = self._answer(worker, share, job)
        finally:
            self._idle.put(worker)
            self._turns.done(share, used)

    def _answer(self, worker: _Worker, share: Share, job: _Job) -> float:
        """Answer one job → the seconds of decoding that it took."""
        if not job.answer.set_running_or_notify_cancel():
            return 0.0
        if share.spent:
            job.answer.set_exception(
                DecodeBudgetSpent(
                    f"the images of this request take longer than {share.seconds:g} seconds to "
                    "decode, all together; send fewer or smaller ones at once"
                )
            )
            return 0.0
        begun, seconds = time.monotonic(), math.inf
        try:
            facts, pixels, stored = self._asked(worker, self._order(job), job.picture.data)
            seconds = float(facts["seconds"])
            if "code" in facts:
                raise error_of(facts["code"], facts["detail"])
            crop = Crop(
                # Not Pillow's, whose four bytes for each pixel are copied to and fro.
                image=np.frombuffer(pixels, np.uint8).reshape(job.height, job.width, 3),
                data=stored or job.picture.data,
                seconds=seconds,
                **{name: facts[name] for name in FACTS},
            )
        except BaseException as error:
            job.answer.set_exception(error)
        else:
            job.answer.set_result(crop)
        # Computing time does not count what else the machine does. Never more than has passed.
        return max(0.0, min(seconds, time.monotonic() - begun))

    def _order(self, job: _Job) -> Order:
        picture = job.picture
        return Order(
            modality=picture.modality,
            polarity=picture.polarity,
            box=picture.box,
            limits=job.limits,
            height=job.height,
            width=job.width,
            seconds=self._seconds,
            keep_metadata=self._keep_metadata,
            sha256=picture.sha256,  # computed here, off the event loop
        )

    def _asked(
        self, worker: _Worker, order: Order, data: bytes
    ) -> tuple[dict[str, Any], bytes, bytes]:
        deaths: list[str] = []
        while True:
            try:
                return worker.ask(order, data)
            except _Died as death:
                worker.kill()
                if self._closing:
                    raise _ending() from death
                log.warning("a decoding process ended (%s); another one takes its place", death)
                deaths.append(death.cause)
                if death.cause == "late":
                    raise ImageUndecodable(
                        f"the image takes longer than {self._seconds:g} seconds to decode; save it "
                        "again as JPEG or PNG"
                    ) from death
                if deaths.count(death.cause) < _TRIES:
                    continue
                if death.cause == "crashed":
                    raise ImageUndecodable(
                        "the image makes its decoder fail: it is damaged or of a variant that is "
                        "not supported; save it again as JPEG or PNG"
                    ) from death
                raise MemoryExhausted(
                    "the process that decodes the image was stopped from outside, as happens when "
                    f"the machine runs out of memory; try again in {_RETRY_AFTER} seconds",
                    headers={"Retry-After": str(_RETRY_AFTER)},
                ) from death


def _ending() -> RuntimeUnavailable:
    return RuntimeUnavailable("the service ends; try again later")


class _Died(Exception):  # noqa: N818 (what happened, not whose error)
    """The process ended before it had answered, or does not answer.

    cause: `late`, the image took all its time; `crashed`, by the image; `killed`, from outside.
    """

    def __init__(self, what: str, cause: Literal["late", "crashed", "killed"]) -> None:
        super().__init__(what)
        self.cause = cause


class _Worker:
    """One process and its socket, used by one thread at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._wire: Wire
        self._ready = False

    def start(self) -> None:
        """Start the process. Raises RuntimeUnavailable."""
        ours, theirs = socketpair()
        self._wire = Wire(ours)
        self._ready = False
        command = [sys.executable, "-m", "service.images.worker", str(theirs.fileno())]
        # One thread is enough for NumPy there; each more would map memory of its own. It is a new
        # session, so that Ctrl-C reaches only the service, which then ends the process.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise RuntimeUnavailable(
                f"no process to decode images can be started ({error.strerror}); check the limits "
                "on processes and memory",
                headers={"Retry-After": str(_RETRY_AFTER)},
            ) from error
        finally:
            theirs.close()

    def ask(self, order: Order, data: bytes) -> tuple[dict[str, Any], bytes, bytes]:
        """Decode one image → facts, pixels and the bytes to store. Raises _Died."""
        if self.process is None:
            self.start()
        try:
            try:
                self._tell(order, data)
            except BrokenPipeError:  # it has ended since the last image
                self.kill()
                self.start()
                self._tell(order, data)
            self._wire.end.settimeout(_PATIENCE * order.seconds + _GRACE)
            facts, pixels, stored = self._wire.receive(3)
            return json.loads(facts), pixels, stored
        except TimeoutError as error:
            # Its own alarm would have ended it long before if it computed: it was stopped.
            raise _Died("no answer", "killed") from error
        except (EOFError, OSError) as error:
            raise self._death() from error

    def _tell(self, order: Order, data: bytes) -> None:
        if not self._ready:
            self._wire.end.settimeout(_START)
            self._ready = self._wire.receive(1) == [READY]
        self._wire.send(json.dumps(vars(order)).encode(), data)

    def stop(self) -> None:
        """Let its thread notice that it ends."""
        if self.process is not None:
            self.process.kill()

    def kill(self) -> None:
        """End the process, and forget it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._wire.end.close()
            self.process = None

    def _death(self) -> _Died:
        """Why the process, whose socket is closed, has ended."""
        assert self.process is not None
        try:
            status = self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return _Died("closed its socket", "crashed")
        if status == -signal.SIGPROF:
            return _Died("out of time", "late")
        by_image = self._ready and (status >= 0 or -status in _CRASHES)
        return _Died(f"status {status}", "crashed" if by_image else "killed")
