"""Log lines through a bounded queue: whoever logs never waits for whoever reads.

A pipe that nobody reads takes 64 KiB, then a write to it blocks. In the event loop that would stop
the service, and the end of it too.
"""

from __future__ import annotations

import io
import logging
import os
import threading
from collections import deque
from typing import TextIO

_LINES = 10_000
_FLUSH_SECONDS = 1.0
_LATER_SECONDS = 0.1

LATER = "later"
"""Attribute of a record that may wait for others, and is formatted in the thread that writes it.

To wake that thread for every request took a thirtieth of a lone query's time.
"""


class QueueHandler(logging.Handler):
    """Writes lines from a thread of its own; drops and counts those that find the queue full.

    dropped: how many lines were lost so far. The first line after a loss says how many.
    """

    def __init__(self, stream: TextIO, lines: int = _LINES) -> None:
        super().__init__()
        self.dropped = 0
        self._stream, self._limit = stream, lines
        self._lines: deque[str | logging.LogRecord] = deque()
        self._change = threading.Condition()
        self._writing = False
        self._told = 0
        self._writer: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        line = record if hasattr(record, LATER) else self._formatted(record)
        if line is None:
            return
        with self._change:
            if len(self._lines) >= self._limit:
                self.dropped += 1
                return
            self._lines.append(line)
            if self._writer is None or not self._writer.is_alive():  # not alive: after a fork
                self._start()
            if line is not record:
                self._change.notify_all()

    def _formatted(self, record: logging.LogRecord) -> str | None:
        try:
            return self.format(record)
        except Exception:
            self.handleError(record)
            return None

    def flush(self) -> None:
        """Wait until all lines are written, a second at most."""
        with self._change:
            self._change.notify_all()
            self._change.wait_for(
                lambda: not self._lines and not self._writing, timeout=_FLUSH_SECONDS
            )

    def _start(self) -> None:
        # A daemon: a write that blocks must not keep the process from ending.
        self._writer = threading.Thread(target=self._write_all, name="log", daemon=True)
        try:
            self._writer.start()
        except RuntimeError:  # no thread can be started now; the next line tries again
            self._writer = None

    def _write_all(self) -> None:
        while True:
            with self._change:
                while not self._lines:
                    self._change.wait(_LATER_SECONDS)
                found, self._writing = self._lines.popleft(), True
                lost, self._told = self.dropped - self._told, self.dropped
            if lost:
                self._write(self._loss(lost))
            line = found if isinstance(found, str) else self._formatted(found)
            written = line is not None and self._write(line)
            with self._change:
                self.dropped += not written
                self._writing = False
                self._change.notify_all()

    def _loss(self, lost: int) -> str:
        message = "%d lines of the log were dropped: standard error was not read"
        return self.format(
            logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, (lost,), None)
        )

    def _write(self, line: str) -> bool:
        try:
            # Without the stream's own lock and buffer, which the interpreter waits for at its end.
            descriptor = self._stream.fileno()
            data = (line + "\n").encode(errors="backslashreplace")
            while data:
                data = data[os.write(descriptor, data) :]
        except io.UnsupportedOperation:  # no file, but text in memory
            self._stream.write(line + "\n")
        except (OSError, ValueError):  # closed, or its disk is full
            return False
        return True
