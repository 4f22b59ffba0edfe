"""The work of `cmt watch`: what is new and whole in a folder is sent, each file once."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from model.image_files import find_images
from model.terminal import say
from service.cli.failures import LABELS, failure_of
from service.cli.interrupts import Stopping
from service.cli.journal import Journal, JournalError, Row, State, Version
from service.cli.naming import LabelsInvalid, Naming
from service.client import Client, Entry, EntryResult, ServiceProblem, Unreachable
from service.client.bulk import EnrollmentError
from service.client.patterns import PathPattern
from service.client.stream import PER_REQUEST, Loaded, batches, load

Done = Literal["leave", "move", "delete"]

_ATTEMPTS = 5  # after which a file that the service fails on is given up
_LONGEST_WAIT = 15.0  # an unanswered question costs the service little
_NO_ANSWER = "no_answer"
_SHOWN = 5  # names of what the pattern leaves out
_GONE = "the folder is not there; it is waited for"
# Of a file that is still being written, though it has looked the same for a while.
_UNFINISHED = ("image_empty", "image_truncated", "image_type_unsupported", "image_undecodable")
_GRACE = 10  # times `settle` for such a file


class Unavailable(Exception):  # noqa: N818 (a state that passes)
    """The service cannot take anything now. after: seconds after which it asks to be tried."""

    def __init__(self, sentence: str, after: float | None = None) -> None:
        super().__init__(sentence)
        self.after = after or 0.0


@dataclass(frozen=True)
class Arrival:
    """A file that is to be enrolled, in one version. below: its path below the folder."""

    below: str
    file: Path
    version: Version


@dataclass
class Watcher:
    """Looks at a folder again and again, and enrolls what is new and whole.

    enrolled, failed: how many files so far. unread: those that cannot be read for now.
    """

    folder: Path
    client: Client
    journal: Journal
    naming: Naming
    done: Done
    aside: Path
    settle: float
    wish: Stopping
    enrolled: int = 0
    failed: int = 0
    unread: set[str] = field(default_factory=set)
    _since: dict[str, tuple[Version, float]] = field(default_factory=dict)
    _not_before: dict[str, float] = field(default_factory=dict)
    _told: set[tuple[Path, str]] = field(default_factory=set)
    _unmatched: set[str] = field(default_factory=set)
    _at_once: int = PER_REQUEST
    _waits: int = 0
    _why: str = ""

    def run(self, interval: float) -> None:
        """Until there is a wish to stop. Raises ServiceProblem for a key that may not enroll."""
        while not self.wish.wanted:
            started = time.monotonic()
            try:
                self._round()
            except (Unavailable, JournalError) as error:
                wait = self._waiting(error)
            else:
                if self._waits:
                    say("Going on.", err=True)
                self._waits, self._why = 0, ""
                # A folder that takes long to list is not listed all the time.
                wait = max(interval, 4 * (time.monotonic() - started))
            self.wish.wait(wait)

    def run_once(self) -> None:
        """Enroll what is whole. Raises EnrollmentError where the service cannot."""
        try:
            if self._round():
                self.wish.wait(self.settle + 0.01)
                self._round()
        except Unavailable as error:
            raise EnrollmentError(f"{error} (what is left is enrolled the next time)") from error

    @property
    def left(self) -> int:
        """How many files are not done with: still changing, not readable, or not answered."""
        return len(self._since)

    @property
    def troubled(self) -> bool:
        """Whether a file could not be enrolled, for good or for now."""
        again = any(row.state == "again" for row in self.journal.rows.values())
        return bool(self.failed or self.unread or again)

    def _round(self) -> int:
        """List the folder, and enroll what is whole → how many files may not be yet."""
        present = self._present()
        if present is None:
            return 0
        self.journal.note_present(present)
        for arrivals in self._batches(self._whole(present)):
            if self.wish.wanted:
                break
            self._ready()
            self._enroll(arrivals, present)
            self._clear({one.below: one.version for one in arrivals})
        self._clear(present)
        return len(self._since)

    def _present(self) -> dict[str, Version] | None:
        """The images that are there, with their versions; None where the folder is gone."""
        if not self.folder.is_dir():
            self._tell(self.folder, _GONE)
            return None
        self._told.discard((self.folder, _GONE))
        found = find_images(self.folder)
        for one in found.skipped:
            if one.lost:
                self._tell(one.path, one.reason)
        present: dict[str, Version] = {}
        for file in found.images:
            if file.is_relative_to(self.aside):
                continue
            below = file.relative_to(self.folder).as_posix()
            if self.naming.pattern is not None and self.naming.pattern.match(below) is None:
                self._tell_unmatched(below, self.naming.pattern)
                continue
            try:
                present[below] = Version.of(file)
            except OSError:  # gone since
                continue
        return present

    def _whole(self, present: dict[str, Version]) -> list[Arrival]:
        """What is to be enrolled and has looked the same for long enough, the oldest first."""
        now = time.monotonic()
        wanted: list[Arrival] = []
        since: dict[str, tuple[Version, float]] = {}
        for below, version in present.items():
            row = self.journal.rows.get(below)
            if row is not None and row.version == version and row.state != "again":
                continue
            before, seen = self._since.get(below, (version, now))
            if row is not None and row.version == version:
                seen = now - self.settle  # it was whole before
            since[below] = (version, seen if before == version else now)
            long_enough = now - since[below][1] >= self.settle
            if long_enough and self._not_before.get(below, now) <= now:
                wanted.append(Arrival(below, self.folder / below, version))
        self._since = since
        return sorted(wanted, key=lambda one: (one.version.mtime_ns, one.below))

    def _batches(self, arrivals: Sequence[Arrival]) -> Iterator[list[Arrival]]:
        """What goes into one request; single files where a request has failed as a whole."""
        by_file = {arrival.file: arrival for arrival in arrivals}
        waiting = list(by_file)
        while waiting:
            entries = (Entry(file) for file in waiting)
            batch = next(batches(entries, self._at_once))
            waiting = waiting[len(batch) :]
            yield [by_file[entry.image] for entry in batch if isinstance(entry.image, Path)]

    def _ready(self) -> None:
        """Raise Unavailable while the service is not ready, and ServiceProblem if it never is."""
        try:
            self.client.ready()
        except Unreachable as error:
            raise Unavailable(str(error)) from error
        except ServiceProblem as problem:
            if problem.status < 500 and problem.status not in (408, 429):
                raise
            raise Unavailable(str(problem), problem.retry_after) from problem

    def _enroll(self, arrivals: Sequence[Arrival], present: dict[str, Version]) -> None:
        """Enroll files in one request, and write down what became of them.

        Raises Unavailable, JournalError, and ServiceProblem for a key that may not enroll.
        """
        rows: list[Row] = []
        again: list[Row] = []
        gone: list[str] = []
        sent: list[tuple[Arrival, Row]] = []
        entries: list[Entry] = []
        for arrival in arrivals:
            loaded = self._load(arrival, rows)
            if loaded is None:
                continue
            labels = loaded.item.model_dump_json(exclude_unset=True, exclude={"key"})
            digest = hashlib.sha256(loaded.image).hexdigest()
            row = Row(arrival.below, arrival.version, digest, "enrolled", labels, at=time.time())
            same = self._known(row, present, gone)
            if same is None:
                sent.append((arrival, row))
                entries.append(Entry(loaded.image, loaded.item))
                continue
            # The same content: only its time, or its name, is another one.
            again.append(replace(same, name=row.name, version=row.version, missing_since=None))
            gone += [same.name] if same.name != row.name else []
        for (arrival, row), result in zip(sent, self._results(sent, entries), strict=True):
            rows.append(self._outcome(arrival, row, result))
        self.journal.write([*rows, *again], gone)
        for row in (*rows, *again):
            if row.state != "again":
                self._since.pop(row.name, None)
        for row in rows:
            self._say(row)

    def _load(self, arrival: Arrival, rows: list[Row]) -> Loaded | None:
        """Read a file; None where that must wait, or has failed for good (in `rows` then)."""
        try:
            entry = self.naming.entry(arrival.file, arrival.below)
        except LabelsInvalid as error:
            row = Row(arrival.below, arrival.version, "", "failed", code=LABELS, reason=str(error))
            rows.append(replace(row, at=time.time()))
            self.failed += 1
            return None
        except OSError:  # gone since
            return None
        if entry is None:
            return None
        [loaded] = load([entry])
        if isinstance(loaded, EntryResult):
            if arrival.file.exists():
                self.unread.add(arrival.below)
                self._tell(arrival.file, f"{loaded.reason}; it is tried again")
                self._not_before[arrival.below] = time.monotonic() + _LONGEST_WAIT / 4
            return None
        self.unread.discard(arrival.below)
        try:
            changed = Version.of(arrival.file) != arrival.version
        except OSError:
            changed = True
        if changed or len(loaded.image) != arrival.version.size:
            self._since.pop(arrival.below, None)  # written to while it was read
            return None
        return loaded

    def _known(self, row: Row, present: dict[str, Version], renamed: Sequence[str]) -> Row | None:
        """An earlier row of the same file: this content, under this name or one that is gone.

        renamed: those that are taken for the earlier names of other files already.
        """
        for known in self.journal.same_content(row.sha256):
            if known.name == row.name and known.state != "again":
                return known
            gone = present.get(known.name) != known.version and known.name not in renamed
            if gone and known.state == "enrolled" and known.labels == row.labels:
                return known
        return None

    def _results(
        self, sent: Sequence[tuple[Arrival, Row]], entries: Sequence[Entry]
    ) -> list[EntryResult]:
        if not entries:
            return []
        try:
            results = [*self.client.enroll_many(entries)]
        except Unreachable as error:
            # Perhaps one of the files brings the service down: find out which.
            if len(entries) == 1:
                reason = f"the service gave no answer {_ATTEMPTS} times ({error})"
                return [EntryResult(entries[0], None, reason, 500, _NO_ANSWER)]
            self._at_once = 1
            raise Unavailable(str(error)) from error
        except ServiceProblem as problem:
            if problem.status in (401, 403):
                raise
            raise Unavailable(str(problem), problem.retry_after) from problem
        for result in results:
            if result.code == "http_error" and (result.status or 0) >= 500:  # of a proxy
                raise Unavailable(result.reason or "a proxy answered in place of the service")
        self._at_once = min(2 * self._at_once, PER_REQUEST)
        return results

    def _outcome(self, arrival: Arrival, row: Row, result: EntryResult) -> Row:
        """What to write down of a result."""
        if result.item is not None:
            self.enrolled += 1
            self._not_before.pop(arrival.below, None)
            return replace(row, item_id=result.item.id)
        failure = failure_of(result, arrival.file)
        attempts = 1
        state: State = "failed"
        if (result.status or 0) >= 500:  # not the file's fault, as far as anybody knows
            before = self.journal.rows.get(row.name)
            if before is not None and before.sha256 == row.sha256:
                attempts = before.attempts + 1
            if attempts < _ATTEMPTS:
                state = "again"
                wait = min(2.0**attempts, _LONGEST_WAIT)
                self._not_before[arrival.below] = time.monotonic() + wait
        if state == "failed":
            self.failed += 1
        return replace(
            row, state=state, code=failure.code, reason=failure.reason, attempts=attempts
        )

    def _clear(self, files: dict[str, Version]) -> None:
        """Move or delete those files that are done with, also by an earlier run."""
        if self.done == "leave":
            return
        gone: list[str] = []
        for below, version in files.items():
            row, file = self.journal.rows.get(below), self.folder / below
            if row is None or row.version != version or row.state == "again":
                continue
            enrolled = row.state == "enrolled"
            if not enrolled and (self.done == "delete" or self._may_grow(row)):
                continue
            try:
                if Version.of(file) != version:
                    continue
                if self.done == "delete":
                    file.unlink()
                else:
                    _move(file, self.aside / row.state / below, row.sha256)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._tell(file, f"cannot be cleared away: {error.strerror or error}")
                continue
            gone.append(below)
        self.journal.write([], gone)

    def _may_grow(self, row: Row) -> bool:
        """Whether a file that was refused may be one that is still being written, very slowly."""
        now = time.time()
        unchanged = max(now - row.at, now - row.version.mtime_ns / 1e9)
        return row.code in _UNFINISHED and unchanged < _GRACE * self.settle

    def _waiting(self, error: Exception) -> float:
        """Say what is waited for, once → seconds until the next attempt, longer each time."""
        if str(error) != self._why:
            self._why = str(error)
            say(f"Waiting: {error}", err=True)
        self._waits += 1
        asked = error.after if isinstance(error, Unavailable) else 0.0
        return max(asked, min(2.0 ** min(self._waits, 10), _LONGEST_WAIT)) * random.uniform(1, 1.25)

    def _tell(self, file: Path, sentence: str) -> None:
        """Say something of a file, once."""
        if (file, sentence) not in self._told:
            self._told.add((file, sentence))
            say(f"{file}: {sentence}", err=True)

    def _tell_unmatched(self, below: str, pattern: PathPattern) -> None:
        if below in self._unmatched:
            return
        self._unmatched.add(below)
        if len(self._unmatched) <= _SHOWN:
            reason = pattern.why_not(below)
            self._tell(self.folder / below, f"left out by the pattern {pattern.text!r}; {reason}")
        elif len(self._unmatched) == _SHOWN + 1:
            say("The pattern leaves out more files, which are not named.", err=True)

    def _say(self, row: Row) -> None:
        """Say what became of a file."""
        if row.state == "enrolled":
            say(f"{row.name}: enrolled as {row.item_id}")
        elif row.state == "failed":
            say(f"{row.name}: {row.reason}", err=True)


def _move(file: Path, target: Path, sha256: str) -> None:
    """Move a file to a name that no other file has. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        name = f"{target.stem}.{sha256[:12] or time.time_ns()}{target.suffix}"
        target = target.with_name(name)
    shutil.move(file, target)
