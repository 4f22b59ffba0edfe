"""Kill a gallery at random moments, again and again, and hold it to what it acknowledged.

    python -m tests.service.crash.run --rounds 100 --json crash.json

After every kill the gallery is opened again: each acknowledged item is there exactly once, with
its bytes and its features; no acknowledged delete is back; a call that was cut off happened
wholly or not at all. All choices follow from the seed; only the operating system's timing does not.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer

from model.machine import machine
from tests.service.crash.gallery_process import GalleryProcess
from tests.service.crash.ledger import Ledger, Worker
from tests.service.crash.service_process import ServiceProcess
from tests.service.crash.subject import TOGETHER, ProcessGone, Session, Subject

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MOMENTS = {"opening": 2, "working": 4, "in a transaction": 4, "closing": 2}  # with their weights
MOST_WRITES = 60  # how late a process kills itself in a transaction
MOST_ACKNOWLEDGED = 30  # how many answers a round waits for before the kill
KEYS_PER_WORKER = 1000  # of one round: far more than it enrolls
RUNNING_ON = 0.05  # seconds: the kill after these answers falls somewhere inside the next calls


@dataclass
class Report:
    """What happened. hits: the calls that a kill cut off, or what else the process was doing."""

    seed: int
    subject: str
    database: str
    machine: dict[str, object] = field(default_factory=machine)
    rounds: int = 0
    enrollments_acknowledged: int = 0
    deletes_acknowledged: int = 0
    searches_answered: int = 0
    unacknowledged_survived: int = 0
    unacknowledged_vanished: int = 0
    verified_items: int = 0
    left_at_the_end: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)


class CrashTest:
    """One gallery, its ledger and the rounds."""

    def __init__(self, subject: Subject, report: Report) -> None:
        self._subject, self._report = subject, report
        self._dice = random.Random(report.seed)
        self._ledger = Ledger()
        self._opening_seconds = self._closing_seconds = 0.0

    def run(self, rounds: int) -> None:
        """A first orderly start and end, the rounds, and a last start that verifies everything."""
        self._orderly(load=True)
        for number in range(1, rounds + 1):
            self._round(number)
            self._report.rounds = number
        self._orderly(load=False)
        self._report.left_at_the_end = len(self._ledger.items)
        self._report.unacknowledged_survived = self._ledger.survived
        self._report.unacknowledged_vanished = self._ledger.vanished
        self._report.verified_items = self._ledger.verified

    def _orderly(self, *, load: bool) -> None:
        started = time.perf_counter()
        self._subject.start(None)
        sessions = self._subject.sessions()
        self._opening_seconds = time.perf_counter() - started
        self._ledger.verify(sessions[0], self._dice, everything=True)
        if load:
            workers = self._load(sessions, 0)
            self._wait(workers, MOST_ACKNOWLEDGED)
            self._stop(workers, orderly=True)
        started = time.perf_counter()
        self._subject.begin_close()
        code = self._subject.ended()
        assert code == 0, f"an orderly end has exit code {code}"
        self._closing_seconds = time.perf_counter() - started

    def _round(self, number: int) -> None:
        dice = self._dice
        moment = dice.choices([*MOMENTS], [*MOMENTS.values()])[0]
        self._report.kills[moment] += 1
        dies = dice.randint(1, MOST_WRITES) if moment == "in a transaction" else None
        self._subject.start(dies)
        if moment == "opening":
            time.sleep(dice.uniform(0, self._opening_seconds))
            self._killed("opening")
            return
        try:
            sessions = self._subject.sessions()
        except ProcessGone:  # its first writes are those of opening
            code = self._subject.ended()
            assert dies is not None, f"no start, exit code {code}"
            assert code < 0, f"no start, exit code {code}"
            self._report.hits["opening"] += 1
            return
        self._ledger.verify(sessions[0], dice, everything=False)
        workers = self._load(sessions, number)
        if moment == "in a transaction":
            assert self._subject.ended() < 0
            self._stop(workers, orderly=False)
            return
        self._wait(workers, dice.randint(0, MOST_ACKNOWLEDGED))
        if moment == "working":
            time.sleep(dice.uniform(0, RUNNING_ON))
            self._subject.kill()
            self._subject.ended()
            self._stop(workers, orderly=False)
            return
        self._stop(workers, orderly=True)
        self._subject.begin_close()
        time.sleep(dice.uniform(0, self._closing_seconds))
        self._killed("closing")

    def _killed(self, doing: str) -> None:
        self._subject.kill()
        code = self._subject.ended()
        assert code <= 0, f"the process failed with exit code {code} before it was killed"
        self._report.hits[doing if code < 0 else f"{doing} was over"] += 1

    def _load(self, sessions: list[Session], number: int) -> list[Worker]:
        """Workers that have begun, each on its share of the persons and with keys of its own."""
        workers = [
            Worker(
                session,
                random.Random(self._dice.randrange(2**32)),
                share,
                self._ledger.items,
                KEYS_PER_WORKER * (TOGETHER * number + place),
                self._subject.most_per_add,
            )
            for place, (session, share) in enumerate(
                zip(sessions, self._ledger.shares(TOGETHER), strict=True)
            )
        ]
        for worker in workers:
            worker.start()
        return workers

    def _wait(self, workers: list[Worker], answers: int) -> None:
        while sum(w.answers for w in workers) < answers and any(w.is_alive() for w in workers):
            time.sleep(0.001)

    def _stop(self, workers: list[Worker], *, orderly: bool) -> None:
        """Wait for the workers, which have been stopped or cut off, and take their answers over."""
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()
        for worker in workers:
            if worker.failure is not None:
                raise worker.failure
            self._ledger.record(worker)
            self._report.enrollments_acknowledged += len(worker.enrolled)
            self._report.deletes_acknowledged += len(worker.gone)
            self._report.searches_answered += worker.searches
        if not orderly:
            cut = Counter(worker.doubt.call for worker in workers if worker.doubt is not None)
            self._report.hits += cut or Counter({"between calls": 1})


@app.command()
def main(
    rounds: int = 5,
    seed: int = 0,
    subject: Literal["gallery", "service"] = "gallery",
    checkpoint: Annotated[Path | None, typer.Option(help="What the service serves.")] = None,
    database_url: Annotated[str | None, typer.Option(help="An empty database.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Kill a gallery, or a whole service, again and again → a report; exit 1 where it broke."""
    report = Report(seed, subject, (database_url or "sqlite").partition(":")[0])
    with tempfile.TemporaryDirectory() as folder:
        victim: Subject
        if subject == "gallery":
            victim = GalleryProcess(Path(folder), database_url)
        elif checkpoint is None:
            raise typer.BadParameter("a service needs --checkpoint")
        else:
            victim = ServiceProcess(Path(folder), database_url, checkpoint)
        try:
            CrashTest(victim, report).run(rounds)
        except BaseException:
            print(f"failed with --seed {seed} --subject {subject} after {report.rounds} rounds")
            raise
        finally:
            victim.kill()
            print(json.dumps(vars(report), indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(vars(report), indent=2) + "\n")


if __name__ == "__main__":
    app()
