"""The same in several processes of this machine: a GPU each, or several for one GPU.

One process decodes in others and computes on its device, and its own work is what limits a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Self

import torch

from model import load_checkpoint
from service.bulk.embedding import Advance, Done, Part
from service.bulk.features import BulkError
from service.bulk.tasks import Worker, carried, take, tasks_of
from service.settings import Settings

_LOOK_SECONDS = 0.2  # between two looks at whether to stop

_worker: Worker


def devices(settings: Settings) -> list[str]:
    """What the setting `device` stands for here: each GPU by itself."""
    if settings.device in ("auto", "cuda") and torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [settings.device]


class ProcessEmbedder:
    """One checkpoint in so many processes, which share the devices and the cores."""

    def __init__(self, settings: Settings, out: Path, root: Path, processes: int) -> None:
        self.fingerprint = load_checkpoint(settings.checkpoint, "cpu")[1].fingerprint
        context = multiprocessing.get_context("spawn")
        chosen = context.Queue()
        names = devices(settings)
        for number in range(processes):
            decoders = max(1, settings.decode_processes // processes)
            device = names[number % len(names)]
            chosen.put(carried(settings, device=device, decode_processes=decoders))
        self._stop = context.Event()
        self._pool = ProcessPoolExecutor(
            processes, context, _start, (chosen, self._stop, str(out.absolute()), str(root))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def embed(
        self, work: Sequence[Part], done: Done, *, advance: Advance, stopping: Callable[[], bool]
    ) -> None:
        """As `BulkEmbedder.embed`, in whole tasks. Raises BulkError where a process dies, too."""
        try:
            left = {self._pool.submit(_do, task) for task in tasks_of(work)}
            while left:
                ended, left = wait(left, _LOOK_SECONDS, FIRST_COMPLETED)
                for task in ended:
                    advance(take(task.result(), done))
                if stopping():
                    self._stop.set()  # what has not begun then finds nothing to do
        except BrokenProcessPool as error:
            raise BulkError(
                "a process that embeds has ended, as where memory runs out or a checkpoint cannot "
                "be loaded; the same command goes on with what is missing, and fewer --processes "
                "need less memory"
            ) from error


def _start(chosen: Queue[str], stop: Event, out: str, root: str) -> None:
    """Begin to work: until the command asks no more, or has died. Ctrl-C is for the command."""
    global _worker
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(chosen.get(), out, root, stop.is_set)


def _do(task: str) -> str:
    return _worker(task)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
