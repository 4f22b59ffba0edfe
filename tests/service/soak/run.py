"""All kinds of load at once, for minutes, on a real service that is held to all it acknowledges.

    python -m tests.service.soak.run --minutes 10 --checkpoint model.safetensors --json soak.json

Clients enroll, search, change and delete, some send nonsense or go away in the middle; meanwhile
the gallery is embedded again by one and another checkpoint, and backed up. Every answer is compared
with a plain ledger, and the whole gallery now and then, at the end and after a restart. Exit status
1 where the service broke a promise, or where its memory grows.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from model import load_checkpoint, save_checkpoint
from model.machine import machine
from service.auth.keys import KeyFile
from tests.service.processes import ServiceProcess, wait_for
from tests.service.soak.figures import Memory, call_figures, memory_figures, readable
from tests.service.soak.ledger import Ledger
from tests.service.soak.workload import Calls, Worker

WORKERS = 6
SAMPLE = 40  # items whose bytes and search are looked at in a round of comparing
TELLING_MINUTES = 3.0  # in less, memory still warms up


class Maintenance(threading.Thread):
    """What an administrator does meanwhile: embeds again, takes backups; one after the other."""

    def __init__(
        self, service: ServiceProcess, token: str, ledger: Ledger, calls: Calls,
        names: tuple[str, str], folder: Path, every: float,
    ) -> None:  # fmt: skip
        super().__init__(name="maintenance")
        self._http = service.client(token, timeout=600)
        self._ledger, self._calls, self._folder, self._every = ledger, calls, folder, every
        self._names = names
        self.present = 0  # which of the two checkpoints is in use
        self.reembeddings = self.backups = 0
        self.notes: list[str] = []
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End after what is in progress."""
        self._stopping.set()

    def run(self) -> None:
        turn = 0
        try:
            while not self._stopping.wait(self._every):
                self._backup()
                # With the checkpoint in use, then with the other one.
                self._reembed(None if turn % 2 == 0 else 1 - self.present)
                turn += 1
        except Exception as error:
            self._ledger.complain(f"{self.name}: {type(error).__name__}: {error}")
        finally:
            self._http.close()

    def _reembed(self, other: int | None) -> None:
        body = {} if other is None else {"checkpoint": self._names[other]}
        began = time.perf_counter()
        answer = self._http.post("/admin/reembed", json=body)
        if answer.status_code != 202:
            raise AssertionError(f"reembed: {answer.status_code} {answer.text}")

        def ended() -> str | None:
            state = str(self._http.get("/admin/reembed").json()["state"])
            return None if state == "running" else state

        state = wait_for(ended, "embedding again does not end", 600)
        self._calls.note("reembed", time.perf_counter() - began, answer.status_code)
        if state != "done":
            raise AssertionError(f"reembed: {self._http.get('/admin/reembed').text}")
        self.present = self.present if other is None else other
        self.reembeddings += 1

    def _backup(self) -> None:
        file = self._folder / "backup.zip"
        began = time.perf_counter()
        with self._http.stream("POST", "/admin/backup") as answer, file.open("wb") as target:
            if answer.status_code == 404:
                self.notes.append("this service takes no backups: POST /admin/backup is a 404")
                return
            answer.raise_for_status()
            for block in answer.iter_bytes():
                target.write(block)
        self._calls.note("backup", time.perf_counter() - began, answer.status_code)
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:
                raise AssertionError("a backup is damaged")
        self.backups += 1


def soak(
    minutes: float, checkpoint: Path, seed: int, folder: Path, *,
    runtime: str = "auto", calls_each: int = 0, changes: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Run for so long → the report. folder: for everything, empty.

    It goes on until every worker has made `calls_each` calls and the gallery was embedded again
    `changes` times, however long a slow machine takes for that.
    """
    files = _two_checkpoints(checkpoint, folder / "checkpoints")
    fingerprints = {load_checkpoint(file)[1].fingerprint for file in files}
    keys = KeyFile(folder / "keys.json")
    _, token = keys.create("soak", ["query", "enroll", "admin"])
    settings: dict[str, Any] = {"api_keys_file": keys.path, "runtime": runtime, "max_receiving": 64}
    ledger, calls, dice = Ledger(fingerprints), Calls(), random.Random(seed)
    pause = min(60.0, max(1.0, 60 * minutes / 4))
    data = folder / "data"
    with ServiceProcess(data, files[0], **settings) as service:
        memory = Memory(service, every=min(1.0, pause / 8))
        maintenance = Maintenance(
            service, token, ledger, calls, (files[0].name, files[1].name), folder, pause
        )
        workers = [Worker(service, token, 100 * seed + n, ledger, calls) for n in range(WORKERS)]
        threads: list[Worker | Maintenance] = [maintenance, *workers]
        memory.start()
        for thread in threads:
            thread.start()
        ending = time.monotonic() + 60 * minutes

        def seconds_left() -> float:
            behind = min(worker.done for worker in workers) < calls_each
            behind = behind or maintenance.reembeddings < changes
            return max(ending - time.monotonic(), pause if behind else 0.0)

        with service.client(token, timeout=120) as http:
            while (left := seconds_left()) > 0 and not ledger.violations:
                time.sleep(min(pause, left))
                with ledger.quiet():
                    ledger.verify(http, dice, SAMPLE)
            for thread in threads:
                thread.stop()
            for thread in threads:
                thread.join()
            memory.stop()
            ledger.verify(http, dice, None)
    _look_at(service, ledger)
    with (
        ServiceProcess(data, files[maintenance.present], **settings) as again,
        again.client(token, timeout=120) as http,
    ):
        ledger.verify(http, dice, SAMPLE)
    return {
        "machine": machine(),
        "checkpoint": checkpoint.name,
        "minutes": minutes,
        "seed": seed,
        "workers": WORKERS,
        "calls": call_figures(calls),
        "memory": memory_figures(memory.samples),
        "enrolled": ledger.enrolled,
        "deleted": len(ledger.gone),
        "left": len(ledger.known),
        "verifications": ledger.rounds,
        "verified_items": ledger.verified,
        "reembeddings": maintenance.reembeddings,
        "backups": maintenance.backups,
        "notes": maintenance.notes,
        "violations": ledger.violations,
    }


def _two_checkpoints(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """A copy, and one with slightly other weights: another model for the gallery."""
    folder.mkdir()
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    shutil.copy(checkpoint, first)
    network, info = load_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(0.01 * weight.abs().mean() * noise)
    save_checkpoint(second, network.eval(), training=info.training)
    return first, second


def _look_at(service: ServiceProcess, ledger: Ledger) -> None:
    """How it ended and what it logged."""
    if service.process.returncode != 0:
        ledger.complain(f"the service ended with status {service.process.returncode}")
    for line in service.log():
        if "exception" in line or line["level"] == "error":
            ledger.complain(f"it logged {_short(line)}")


def _short(line: dict[str, Any]) -> str:
    """A line of the log, of its tracebacks the end, where they say what went wrong."""
    for one in line.get("exception", []):
        one["frames"] = [f"{f['filename']}:{f['lineno']}" for f in one["frames"][-8:]]
    return json.dumps(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--checkpoint", type=Path, default=Path("examples/compact.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(options.minutes, options.checkpoint, options.seed, Path(folder))
    print(readable(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    grows = options.minutes >= TELLING_MINUTES and not report["memory"]["flat"]
    return 1 if report["violations"] or grows else 0


if __name__ == "__main__":
    sys.exit(main())
