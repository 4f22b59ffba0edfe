"""Ctrl-C, SIGTERM and a closed terminal as a wish to stop, on which a command ends its work."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit status of a command that was interrupted."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopping:
    """Whether somebody wants the command to stop. sentence: said at once, at the first signal.

    raises: the first signal also raises KeyboardInterrupt, for a command that does not ask.
    At the second signal the process ends: its threads may wait for an answer for minutes. What
    must happen even then is `at_once`.
    """

    def __init__(self, sentence: str, *, raises: bool = False) -> None:
        self._sentence, self._raises = sentence, raises
        self._wanted = threading.Event()
        self.at_once: Callable[[], None] = lambda: None

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
            try:
                self.at_once()
            finally:
                os._exit(INTERRUPTED)
        self._wanted.set()
        if number != signal.SIGHUP:  # after which there may be no terminal
            os.write(2, f"\n{self._sentence}\n".encode())
        if self._raises:
            raise KeyboardInterrupt


@contextmanager
def stopping(sentence: str, *, raises: bool = False) -> Iterator[Stopping]:
    """Within, signals that end a process are a wish to stop.

    After a wish they stay one: the second signal may come while the command ends, and says the same
    then as a moment before. While the interpreter is put away at last, they do nothing more.
    """
    wish = Stopping(sentence, raises=raises)
    before = {number: signal.signal(number, wish.signalled) for number in _SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            if wish.wanted:
                atexit.register(signal.signal, number, signal.SIG_IGN)
            else:
                signal.signal(number, handler)
