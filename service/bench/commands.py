"""How long fresh processes take: `cmt serve` until it is ready, and commands until they end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from model.benchmark import Spread, seconds
from model.benchmark_table import CMT
from service.bench.serving.load import HOST
from service.bench.serving.rivals import Server, ServerError, running, without_settings

READY, HELP, LIST = "cmt serve, until it is ready", "cmt --help", "cmt gallery list, over HTTP"
PYTHON, TORCH = "Python alone", "Python and PyTorch alone"
_POLL = 0.002  # seconds between two questions whether it is ready


class Commands:
    """Starts each in turn, after one start that fills the caches and is not counted.

    folder: for the data of the service, and what it says.
    """

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        options = {"--checkpoint": checkpoint, "--data-dir": folder / "served", "--host": HOST}
        given = (str(part) for option in options.items() for part in option)
        self._server = Server("cmt serve", (*CMT, "serve", *given, "--port"), ())
        self._log = folder / "served.log"
        self._taken: dict[str, list[float]] = {}

    def measure(self, starts: int) -> list[dict[str, Any]]:
        """Seconds of each over so many starts, beside those of a process that does less."""
        for _ in range(1 + starts):
            self._round()
        spreads = {what: Spread.of(taken[1:]) for what, taken in self._taken.items()}
        beside = {READY: TORCH, HELP: PYTHON, LIST: PYTHON}
        return [
            {
                "process": what,
                "seconds": spreads[what],
                "beside": rival,
                "seconds beside": spreads[rival],
            }
            for what, rival in beside.items()
        ]

    def _round(self) -> None:
        begun = time.perf_counter()
        with running(self._server, self._log) as (process, port):
            _wait(process, port, self._log)
            self._note(READY, time.perf_counter() - begun)
            self._run(LIST, (*CMT, "gallery", "list", "--url", f"http://{HOST}:{port}"))
        self._run(HELP, (*CMT, "--help"))
        self._run(PYTHON, (sys.executable, "-c", "pass"))
        self._run(TORCH, (sys.executable, "-c", "import torch"))

    def _run(self, what: str, command: Sequence[str]) -> None:
        kept = without_settings()
        self._note(
            what,
            seconds(lambda: subprocess.run(command, check=True, capture_output=True, env=kept)),
        )

    def _note(self, what: str, taken: float) -> None:
        self._taken.setdefault(what, []).append(taken)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until /readyz answers 200. Raises ServerError where the process ends before."""
    while process.poll() is None:
        with suppress(OSError, HTTPException):
            asked = HTTPConnection(HOST, port, timeout=60)
            try:
                asked.request("GET", "/readyz")
                if asked.getresponse().status == 200:
                    return
            finally:
                asked.close()
        time.sleep(_POLL)
    raise ServerError.ended("cmt serve", log)
