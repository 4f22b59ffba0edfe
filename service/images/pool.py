"""The decoding processes, and the service's end of their pipes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from queue import LifoQueue
from typing import Any

from PIL import Image

from service.errors import ImageUndecodable, RuntimeUnavailable, error_of
from service.images.decode import Crop, ImageLimits, Picture
from service.images.protocol import FACTS, Order

log = logging.getLogger(__name__)

_GRACE = 2.0  # seconds beyond its own limit until a process that does not answer is killed


class Decoders:
    """`count` processes that decode one image each at a time. Thread-safe.

    seconds: how long one image may take.
    """

    def __init__(self, count: int, limits: ImageLimits, *, seconds: float) -> None:
        self._limits, self._seconds = limits, seconds
        self._all = [_Worker() for _ in range(count)]
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for worker in self._all:
            worker.start()
            self._idle.put(worker)

    def decode(
        self, picture: Picture, height: int, width: int, limits: ImageLimits | None = None
    ) -> Crop:
        """Decode one upload, waiting for a free process.

        height, width: of the network's input. The crop's picture has that size, so that what waits
        for the network is small however large the upload was. limits: instead of the pool's. Raises
        ServiceError of status 413, 415 or 422; RuntimeUnavailable where no process starts.
        """
        order = Order(
            modality=picture.modality,
            polarity=picture.polarity,
            box=picture.box,
            limits=limits or self._limits,
            height=height,
            width=width,
            seconds=self._seconds,
            sha256=picture.sha256,
        )
        worker = self._idle.get()
        try:
            facts, pixels, stored = self._answer(worker, order, picture.data)
        finally:
            self._idle.put(worker)
        if "code" in facts:
            raise error_of(facts["code"], facts["detail"])
        return Crop(
            image=Image.frombytes("RGB", (width, height), pixels),
            data=picture.data if picture.box is None else stored,
            **{name: facts[name] for name in FACTS},
        )

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that run."""
        return [worker.process.pid for worker in self._all if worker.process is not None]

    def close(self) -> None:
        """End all processes."""
        for worker in self._all:
            worker.kill()

    def _answer(
        self, worker: _Worker, order: Order, data: bytes
    ) -> tuple[dict[str, Any], bytes, bytes]:
        for last in (False, True):
            try:
                return worker.ask(order, data)
            except _Died as death:
                worker.kill()
                log.warning("a decoding process ended (%s); another one takes its place", death)
                if death.timeout:
                    raise ImageUndecodable(
                        f"the image takes longer than {self._seconds:g} seconds to decode; save it "
                        "again as JPEG or PNG"
                    ) from death
                # It may have been killed for another reason: the image gets a second try.
                if last:
                    raise ImageUndecodable(
                        "the image makes its decoder fail: it is damaged or of a variant that is "
                        "not supported; save it again as JPEG or PNG"
                    ) from death
        raise AssertionError


class _Died(Exception):  # noqa: N818 (what happened, not whose error)
    """The process ended before it had answered."""

    def __init__(self, status: int | None) -> None:
        super().__init__("no answer" if status is None else f"status {status}")
        self.timeout = status in (None, -signal.SIGALRM)


class _Worker:
    """One process and its pipe, used only by the thread that took it from the idle ones."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection

    def start(self) -> None:
        """Start the process. Raises RuntimeUnavailable."""
        self._pipe, theirs = Pipe()
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
            self._pipe.close()
            raise RuntimeUnavailable(
                f"no process to decode images can be started ({error.strerror}); check the limits "
                "on processes and memory"
            ) from error
        finally:
            theirs.close()

    def ask(self, order: Order, data: bytes) -> tuple[dict[str, Any], bytes, bytes]:
        """Decode one image → facts, pixels and the bytes to store. Raises _Died."""
        if self.process is None or self.process.poll() is not None:
            self.kill()
            self.start()
        try:
            self._pipe.send_bytes(json.dumps(asdict(order)).encode())
            self._pipe.send_bytes(data)
            if not self._pipe.poll(order.seconds + _GRACE):
                raise _Died(None)
            facts = json.loads(self._pipe.recv_bytes())
            return facts, self._pipe.recv_bytes(), self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            assert self.process is not None
            raise _Died(self.process.wait()) from error

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._pipe.close()
            self.process = None
