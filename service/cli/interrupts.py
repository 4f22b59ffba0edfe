"""Ctrl-C, SIGTERM and a closed terminal as a wish to stop, on which a command ends its work."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit status of a command that was interrupted."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopping:
    """Whether somebody wants the command to stop. sentence: said at once, at the first signal.

    At the second signal the process ends: its threads may wait for an answer for minutes.
    """

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence
        self._wanted = threading.Event()

    @property
    def wanted(self) -> bool:
        """Whether a signal has come."""
        return self._wanted.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait, shorter if a signal comes → whether one has."""
        return self._wanted.wait(seconds)

    def signalled(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. What is interrupted may be printing: this writes past all buffers."""
        if self.wanted:
            os._exit(INTERRUPTED)
        self._wanted.set()
        if number != signal.SIGHUP:  # after which there may be no terminal
            os.write(2, f"\n{self._sentence}\n".encode())


@contextmanager
def stopping(sentence: str) -> Iterator[Stopping]:
    """Within, signals that end a process are a wish to stop."""
    wish = Stopping(sentence)
    before = {number: signal.signal(number, wish.signalled) for number in _SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
