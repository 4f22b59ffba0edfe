"""Run the application under uvicorn: in this thread until a signal, or in another for a while."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.settings import Settings

log = logging.getLogger(__name__)


class ServerError(Exception):
    """The service cannot start; the message says what to do."""


def bind(host: str, port: int) -> socket.socket:
    """A socket bound before anything is loaded, so that a port in use is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise ServerError(
            f"cannot listen on {host} port {port} ({error.strerror}); stop what uses it, or choose "
            "another with --port"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL at which a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight finish first.

    Raises ServerError (address), CheckpointError or ServiceError (gallery) when it cannot start.
    """
    bound = bind(settings.host, settings.port)
    app, server = _make(settings)
    # uvicorn raises the signal that ended it once more: let it find a handler that does nothing,
    # so that an orderly end is exit status 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    log.info("loading %s, then serving on %s", settings.checkpoint, address_of(bound))
    with bound, suppress(SystemExit):  # uvicorn exits where the lifespan could not start
        server.run(sockets=[bound])
    if not server.started and isinstance(failure := app.state.failure, BaseException):
        raise failure


@contextmanager
def running(settings: Settings) -> Iterator[str]:
    """Serve from a thread of its own → the URL, once requests are answered."""
    bound = bind(settings.host, settings.port)
    app, server = _make(settings)
    ended = threading.Event()

    def serve() -> None:
        try:
            with bound, suppress(SystemExit):
                server.run(sockets=[bound])
        finally:
            ended.set()

    url = address_of(bound)
    thread = threading.Thread(target=serve, name="cmt-service")
    thread.start()
    try:
        while not server.started and not ended.wait(0.05):
            pass
        if not server.started:
            raise app.state.failure or ServerError("the service ended before it had started")
        yield url
    finally:
        server.should_exit = True
        thread.join()


def _make(settings: Settings) -> tuple[FastAPI, uvicorn.Server]:
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        # The access log would hold query strings, and with them names of persons.
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout,
    )
    logging.getLogger("uvicorn.error").addFilter(_no_startup_traceback)
    return app, uvicorn.Server(config)


def _no_startup_traceback(record: logging.LogRecord) -> bool:
    """uvicorn logs why a start failed as a traceback; whoever runs it gets the exception itself."""
    return not record.getMessage().startswith("Traceback ")
