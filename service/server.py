"""Run the application under uvicorn: in this thread until a signal, or in another for a while."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from model.terminal import say
from service.app import create_app
from service.http.connection_timeouts import Lingering, timed_protocol
from service.http.middleware import DrainState
from service.kit.device_loss import LOST, on_device_loss, report_loss
from service.kit.heap import give_back_large_blocks
from service.pipeline.begun import Begun
from service.settings import Settings

# How long a thread may keep the interpreter while others wait for it. The event loop, searches and
# the embedding thread take turns in steps of less than a millisecond; with Python's 5 ms two cores
# answered a fifth fewer queries (`cmt bench serve`), a lone client's too.
_SWITCH_SECONDS = 0.0005
# After a lost GPU: how long requests that do not need it may take to finish, and until the process
# ends whatever hangs.
_LOST_SECONDS = 5.0
_END_SECONDS = 15.0
_SAY_SECONDS = 3.0

log = logging.getLogger(__name__)


class ServerError(Exception):
    """The service cannot start; the message says what to do."""


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket before anything is loaded, so that a port in use is reported at once.

    Raises ServerError.
    """
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


def run(settings: Settings, started: Begun | None = None) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; requests in flight finish first.

    started: what the caller has begun already, and ends; None begins it here.

    A SIGHUP that the caller ignores, as nohup does, stays ignored. Where the GPU is lost the
    process ends with status 1, so that whatever supervises it starts it again.

    Raises ServerError (address), CheckpointError or ServiceError (gallery) when it cannot start.
    """
    give_back_large_blocks()
    os.umask(0o077)  # whatever a library writes into the data folder is its owner's alone
    bound = bind(settings.host, settings.port)
    app, server = _make(settings, started)
    sys.setswitchinterval(_SWITCH_SECONDS)
    # uvicorn raises the signal that ended it again: a handler that does nothing lets an orderly end
    # have exit status 0.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)
    log.info("settings: %s", json.dumps(settings.redacted()))
    log.info("loading %s, then serving on %s", settings.checkpoint, address_of(bound))
    with on_device_loss(_end_in_time), on_device_loss(server.lose_device):
        with bound, suppress(SystemExit):  # uvicorn exits where the lifespan could not start
            server.run(sockets=[bound])
        failure = app.state.failure
        if not server.started and isinstance(failure, BaseException) and not report_loss(failure):
            raise failure
    if server.lost is not None:
        _end(server.lost)


@contextmanager
def running(settings: Settings) -> Iterator[str]:
    """Serve from another thread → the URL, once requests are answered. Raises as `run`."""
    bound = bind(settings.host, settings.port)
    app, server = _make(settings)
    ended = threading.Event()

    def serve() -> None:
        try:
            with bound, suppress(SystemExit), on_device_loss(server.lose_device):
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


def _make(settings: Settings, started: Begun | None = None) -> tuple[FastAPI, _Server]:
    app = create_app(settings, started=started)
    lingering: Lingering = {}
    config = uvicorn.Config(
        app,
        http=timed_protocol(settings.header_timeout, settings.body_timeout, lingering),
        timeout_keep_alive=settings.keep_alive_timeout,
        # There are no WebSockets, and uvicorn would log the query string of a request for one.
        ws="none",
        # The access log would hold query strings, and with them names of persons.
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # `service.http.intake` understands them
        timeout_graceful_shutdown=settings.shutdown_timeout,
    )
    logging.getLogger("uvicorn.error").addFilter(_of_use)
    return app, _Server(config, app.state.drain, lingering, settings)


def _end_in_time(why: str) -> None:
    """End the process after a while, whatever hangs: a thread may wait for a lost GPU for ever."""
    timer = threading.Timer(_END_SECONDS, _end, [_told(why)])
    timer.daemon = True
    timer.start()


def _told(why: str) -> str:
    return f"{LOST.partition(';')[0]} ({why})"


def _end(sentence: str) -> NoReturn:
    """Say why and end with status 1, without what libraries do at the end of an interpreter.

    They would wait for a GPU that answers no more, or abort.
    """
    timer = threading.Timer(_SAY_SECONDS, os._exit, [1])  # nobody may read standard error
    timer.daemon = True
    timer.start()
    try:
        for handler in logging.getLogger().handlers:
            handler.flush()
        say(f"Error: {sentence}", err=True)
    finally:
        os._exit(1)


class _Server(uvicorn.Server):
    """After a signal new requests are answered with 503 while those in flight finish.

    It keeps listening until nothing is in flight and `shutdown_linger` is over, so that a load
    balancer sees the 503 before connections are refused. While it loads, a signal takes effect once
    that is done. A second Ctrl-C ends it at once: it cancels what is in flight, and does not wait
    for threads that load or close, since whatever they write outlives the loss of power.

    lost: the sentence that says how the GPU was lost, after which it ends as by a signal.
    """

    def __init__(
        self, config: uvicorn.Config, drain: DrainState, lingering: Lingering, settings: Settings
    ) -> None:
        super().__init__(config)
        self._drain, self._lingering, self._settings = drain, lingering, settings
        self._signalled: float | None = None
        self._patience: float = settings.shutdown_timeout
        self.lost: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            os._exit(128 + sig)
        if self._signalled is not None or not self.started:
            if self._signalled is None and not self.should_exit:
                self._say("loading: it ends once that is done; a second Ctrl-C ends it at once")
            self.config.timeout_graceful_shutdown = 0
            super().handle_exit(sig, frame)
            return
        self._say("ending once requests in flight are answered; a second Ctrl-C ends it at once")
        self._captured_signals.append(sig)
        self._signalled = time.monotonic()
        self._drain.closing = True

    def lose_device(self, why: str) -> None:
        """Refuse everything from now on, and end. Called in any thread."""
        self.lost = _told(why)
        self._drain.why, self._drain.closing = LOST, True
        self._patience = min(_LOST_SECONDS, self._patience)
        if self._signalled is None:
            self._signalled = time.monotonic()
        log.critical(self.lost)

    def _say(self, sentence: str) -> None:
        """Log from a signal handler, which may have interrupted a line of the log."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(log.info, sentence)

    async def on_tick(self, counter: int) -> bool:
        if self._signalled is not None and not self.should_exit:
            passed = time.monotonic() - self._signalled
            idle = not self._drain.in_flight and not self._lingering
            idle = idle and passed >= self._settings.shutdown_linger
            self.should_exit = idle or passed >= self._patience
            if self.should_exit:
                # Requests still in flight have run out of time.
                self.config.timeout_graceful_shutdown = 1
        return await super().on_tick(counter)


def _of_use(record: logging.LogRecord) -> bool:
    """Drop lines of uvicorn: the traceback of a failed start, since `run` raises the exception
    itself, and the error that requests were cancelled where there were none.
    """
    return not record.getMessage().startswith(("Traceback ", "Cancel 0 "))
