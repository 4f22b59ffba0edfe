"""`cmt serve` as a process of its own: its address, its log, what it holds, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

CMT = [sys.executable, "-c", "import sys; from model.cli import main; sys.exit(main())"]
STARTING_SECONDS = 120.0  # generous: a start takes a few seconds, on a busy machine many
ENDING_SECONDS = 60.0
_SERVING = re.compile(r"serving on (http://[\w.:\[\]]+)")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class ServiceProcess:
    """A service on a data folder; `settings` are those of `service.settings`.

    before: Python that its process runs first, to cause what cannot be caused from outside.
    """

    def __init__(
        self, data_dir: Path, checkpoint: Path, *, before: str = "", **settings: Any
    ) -> None:
        chosen = {
            "data_dir": data_dir,
            "checkpoint": checkpoint,
            "runtime": "torch",
            "device": "cpu",
            "port": 0,
            "log_format": "json",
            **settings,
        }
        kept = {name: text for name, text in os.environ.items() if not name.startswith("CMT_")}
        given = {f"CMT_{name.upper()}": _text(value) for name, value in chosen.items()}
        self.lines: list[str] = []
        """What it has written to standard error."""
        # A session of its own, so that Ctrl-C can be sent to all of it, as a terminal does.
        python, option, program = CMT
        self.process = subprocess.Popen(
            [python, option, f"{before}\n{program}", "serve"],
            env={"OMP_NUM_THREADS": "1", **kept, **given},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._url = ""

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        elif self.process.poll() is None:
            self.send(signal.SIGTERM)
            self.ended()

    @property
    def url(self) -> str:
        """Where it is reached."""
        if not self._url:
            told = wait_for(self._told, "the log does not say an address", STARTING_SECONDS)
            self._url = str(told)
        return self._url

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, for a socket."""
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        """Plain HTTP to it."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # verify: without TLS there are no certificates to load, which takes longer than a request.
        usual = {"timeout": 60, "trust_env": False, "verify": False}
        return httpx.Client(base_url=self.url, headers=headers, **{**usual, **options})

    def wait_until_ready(self) -> None:
        """Until /readyz answers 200."""

        def ready() -> bool:
            assert self.process.poll() is None, f"it ended: {self.text()}"
            return is_up(http, "/readyz")

        with self.client() as http:
            wait_for(ready, "it does not become ready", STARTING_SECONDS)

    def send(self, number: signal.Signals) -> None:
        """A signal; Ctrl-C goes to the whole session, as from a terminal."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def ended(self, seconds: float = ENDING_SECONDS) -> int:
        """Wait for its end → the exit status; all it has logged is in `lines` then."""
        status = self.process.wait(seconds)
        self._reader.join(ENDING_SECONDS)
        return status

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        self.process.kill()
        self.ended()

    def text(self) -> str:
        """Its log so far."""
        return "".join(self.lines)

    def log(self) -> list[dict[str, Any]]:
        """Its log so far, parsed, without a line within which it was killed."""
        return [json.loads(line) for line in self.lines if line.endswith("\n")]

    def descriptors(self) -> int:
        """How many files and sockets it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208

    def holds(self, connection: socket.socket) -> bool:
        """Whether it has the other end of a connection open."""
        here, there = (f":{port:04X}" for port in (self.address[1], connection.getsockname()[1]))
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, *_, inode = line.split()[:10]
            if local.endswith(here) and remote.endswith(there):
                return inode != "0"  # of a socket that no process has any more
        return False

    def children(self) -> list[int]:
        """The processes that it has started and that run."""
        return children_of(self.process.pid)

    def memory(self) -> dict[str, int]:
        """Resident bytes of the service, and of its children together."""
        return {
            "service": resident(self.process.pid),
            "children": sum(resident(child) for child in self.children()),
        }

    def _told(self) -> str | None:
        assert self.process.poll() is None, f"it ended: {self.text()}"
        found = _SERVING.search(self.text())
        return None if found is None else found[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)


def wait_for(probe: Callable[[], Any], complaint: str, seconds: float = 60.0) -> Any:
    """Ask until the answer is true → the answer."""
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"{complaint} within {seconds:g} seconds"
        time.sleep(0.02)
    return answer


def is_up(http: httpx.Client, path: str) -> bool:
    """Whether a server that is starting answers 2xx; it may refuse connections, or TLS, yet."""
    try:
        return http.get(path).is_success
    except httpx.TransportError:
        return False


def gauge(http: httpx.Client, name: str) -> float:
    """A metric without labels, as /metrics says it."""
    found = re.search(rf"^{name} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def wait_until_idle(http: httpx.Client) -> None:
    """Until no upload is received, worked on or waits for the network."""
    names = ("cmt_uploads_receiving", "cmt_uploads_pending", "cmt_embed_waiting")
    wait_for(lambda: not any(gauge(http, name) for name in names), "places are not given back")


def assert_no_defect(service: ServiceProcess) -> None:
    """Nothing in the log that a programmer would have to look at."""
    bad = [one for one in service.log() if "exception" in one or one["level"] == "error"]
    assert not bad, bad
    assert "Traceback" not in service.text()


def multipart(path: str, images: list[bytes], fields: Mapping[str, str] | None = None) -> bytes:
    """A POST with images and text fields, as HTTP/1.1 writes it."""
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n%b\r\n' % image
        for image in images
    )
    for name, value in (fields or {}).items():
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        body += head.encode()
    body += b"--b--\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that run or are not waited for."""
    found: list[int] = []
    with suppress(OSError):  # it has ended
        for thread in [*Path(f"/proc/{pid}/task").iterdir()]:
            with suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return sorted(found)


def runs(pid: int) -> bool:
    """Whether a process runs, and is no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextmanager
def kept_port() -> Iterator[int]:
    """A port of this machine for a server that must be told one; nobody else is given it.

    It is bound here and not listened at: a server that sets SO_REUSEADDR, as all do, gets it.
    """
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]


def resident(pid: int) -> int:
    """Bytes of a process in memory; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | tuple) else str(value)
