"""Logs: one JSON object per line, or readable lines on a terminal; the same for libraries' logs.

Every line of a request carries its `request_id`.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

import structlog
from structlog.types import EventDict, Processor

from model.terminal import printable
from service.observability.log_queue import LATER, QueueHandler

Format = Literal["auto", "json", "console"]

# They log lines at every start, request or migration that are of no use to operators: faiss.loader
# tells of libraries for other processors that it could not load, as if that were an error.
_NOISY = ("alembic", "faiss.loader", "httpx", "httpcore")


_EVERY: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
]
# Always through `logging`: a program that embeds the service decides where its lines go.
structlog.configure(
    processors=[
        structlog.stdlib.filter_by_level,
        *_EVERY,
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
    ],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
)

get_logger = structlog.stdlib.get_logger


def log_often(name: str, level: int, event: str, **values: object) -> None:
    """Log what every request logs: as a logger of structlog does, in a fraction of the time.

    The line is put together in the thread that writes it. values: nothing that changes later.
    """
    logger = logging.getLogger(name)
    if not logger.isEnabledFor(level):
        return
    word = logging.getLevelName(level).lower()
    line = {**values, "event": event, "level": word, "logger": name}
    of_structlog = {"_logger": logger, "_name": word, LATER: True}
    logger.handle(logger.makeRecord(name, level, "", 0, line, (), None, None, of_structlog))


def configure_logs(format: Format, level: str, stream: TextIO | None = None) -> None:
    """Send all logs of this process to `stream`, by default standard error.

    "auto": readable lines on a terminal, otherwise JSON. Lines that `stream` does not take in time
    are dropped and counted: see `dropped_lines`.
    """
    stream = stream or sys.stderr
    readable = format == "console" or (format == "auto" and stream.isatty())
    last: list[Processor] = (
        [
            structlog.processors.format_exc_info,
            _printable,
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
        if readable
        else [
            structlog.processors.ExceptionRenderer(
                # Without the values of variables, which may be names of persons or keys.
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            structlog.processors.JSONRenderer(),
        ]
    )
    handler = QueueHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_EVERY,
            processors=[
                _stamped,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *last,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _stamped(logger: object, method: str, event: EventDict) -> EventDict:
    """With the time when the line was logged, which may be written later."""
    moment = datetime.fromtimestamp(event["_record"].created, UTC)
    event["timestamp"] = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return event


def _printable(logger: object, method: str, event: EventDict) -> EventDict:
    """A line for people: what clients sent commands no terminal."""
    return {
        name: "\n".join(map(printable, value.split("\n") if name == "exception" else [value]))
        if isinstance(value, str)
        else value
        for name, value in event.items()
    }


def dropped_lines() -> int:
    """How many lines of the log were lost, because nobody read them."""
    handlers = logging.getLogger().handlers
    return sum(one.dropped for one in handlers if isinstance(one, QueueHandler))
