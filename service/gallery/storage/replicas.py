"""The processes that share one PostgreSQL database: who lives, who leads, and what wakes them.

What they tell each other is in tables that no backup has and that a crash of the server may empty;
all of it is said again within seconds. Times in them are the database's, so that no replica's clock
counts. Everything works behind a pooler that lends sessions for one transaction, but for LISTEN:
there, and where a notification is lost, a replica looks by itself every `POLL` seconds.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from service.errors import GalleryVersion, ModelVersionConflict, ServiceError
from service.gallery.storage.database import Database
from service.gallery.storage.shared_rates import count_request
from service.gallery.storage.streaming import CHANNEL
from service.gallery.times import utc_now

log = logging.getLogger(__name__)

POLL = 0.4  # seconds between two looks where nothing wakes a replica
_BEAT = 1.0  # seconds between two signs of life
LIVE = 5.0
"""Seconds after its last sign of life that a replica counts as alive, and its tasks as its own."""
_SILENT = 6.0  # seconds after which a server that has not answered a sign of life is given up
_REST = 0.02  # seconds between two rounds, so that one serves many commits
_CLOCK_BOUND = 5.0  # seconds that a replica's clock may differ from the database's, unsaid

_TABLES = (
    """CREATE UNLOGGED TABLE cmt_replicas (id text PRIMARY KEY, host text NOT NULL,
       release text NOT NULL, model text NOT NULL, seen timestamptz NOT NULL)""",
    """CREATE UNLOGGED TABLE cmt_tasks (name text PRIMARY KEY, holder text NOT NULL,
       until timestamptz NOT NULL, details text NOT NULL)""",
    """CREATE UNLOGGED TABLE cmt_rates (who text, rate text, counts text NOT NULL,
       PRIMARY KEY (who, rate))""",
)
_LIVE = f"interval '{LIVE} seconds'"
_TAKE = f"""
    INSERT INTO cmt_tasks VALUES (:name, :id, clock_timestamp() + {_LIVE}, :details)
    ON CONFLICT (name) DO UPDATE
    SET holder = excluded.holder, until = excluded.until, details = excluded.details
    WHERE cmt_tasks.until < clock_timestamp()
"""
_SIGN = text(f"""
    WITH sign AS (
        INSERT INTO cmt_replicas VALUES (:id, :host, :release, :model, clock_timestamp())
        ON CONFLICT (id) DO UPDATE SET model = excluded.model, seen = excluded.seen
    ), renewed AS (
        UPDATE cmt_tasks SET until = clock_timestamp() + {_LIVE}
        WHERE holder = :id AND name = :run AND :running
    ), led AS (
        {_TAKE} OR cmt_tasks.holder = excluded.holder RETURNING name
    )
    SELECT (SELECT count(*) FROM led) AS leads,
           (SELECT count(*) FROM cmt_replicas
            WHERE id <> :id AND seen > clock_timestamp() - {_LIVE}) AS others,
           (SELECT active.fingerprint FROM models active JOIN models mine
            ON mine.fingerprint = :model AND mine.state = 'retired'
            WHERE active.state = 'active') AS successor,
           run.details, run.holder = :id AS mine, run.until > clock_timestamp() AS alive,
           clock_timestamp() AS moment
    FROM (SELECT 1) one LEFT JOIN cmt_tasks run ON run.name = :run
""")
_LEAD, _RUN = "background work", "reembed"


def clocks_differ(ahead: float, took: float = 0.0) -> str | None:
    """That a machine's clock is so many seconds ahead of the database's; None if hardly.

    took: seconds between the looks at the two, at most.
    """
    if abs(ahead) - took <= _CLOCK_BOUND:
        return None
    where = "ahead of" if ahead > 0 else "behind"
    return (
        f"the machine's clock is {abs(ahead):.0f} s {where} the database's, so that times of "
        "enrollments and of the audit log are wrong; set both by NTP"
    )


class Run(NamedTuple):
    """A run that embeds the gallery again. details: what it says of itself. alive: it goes on.

    mine: this process is the one that runs it.
    """

    details: Mapping[str, Any]
    alive: bool
    mine: bool


class Replicas:
    """This process among those on the PostgreSQL database `url`. Thread-safe.

    Open it before anything of the gallery is changed. model: fingerprint of the checkpoint in use.
    Raises GalleryVersion where living replicas are of another release, and ModelVersionConflict
    where they search with another checkpoint, unless one of the two is about to follow the other to
    the version that the gallery has gone on to.

    It says: others: how many more replicas live. successor: fingerprint of the version that the
    gallery has gone on to, None where `model` is not retired. run_elsewhere: the newest run, where
    it is another replica's and has not come to its end. clock_ahead: seconds by which this
    machine's clock is surely ahead of the database's. listens: whether NOTIFY reaches it.
    """

    def __init__(self, folder: Path, url: str, model: str) -> None:
        # Of its own, so that a sign of life waits for no connection that the gallery uses.
        self._database = Database(folder, url, migrate=False)
        self.id, self.model = uuid.uuid4().hex, model
        self._host, self._release = socket.gethostname(), version("cmt-reid")
        self._leads_until = -math.inf
        self.others, self.clock_ahead = 0, 0.0
        self.successor: str | None = None
        self.run_elsewhere: Run | None = None
        self.listens = False
        self._woken, self._closing = threading.Event(), threading.Event()
        self._clock_told = False
        self._running = False  # a run that embeds again is this replica's
        self._watched = [self._database]
        try:
            self._join()
        except BaseException:
            self._database.close()
            raise
        self._threads = [self._thread(self._keep_beating, "replica")]

    @property
    def leads(self) -> bool:
        """Whether this process does the work that only one of them does."""
        return time.monotonic() < self._leads_until

    def _join(self) -> None:
        seen: dict[str, datetime] = {}
        while True:
            with self._database.writing() as connection:
                _make_tables(connection)
                misfits = {row.id: row for row in self._misfits(connection)}
                if not misfits:
                    connection.execute(
                        text(
                            "INSERT INTO cmt_replicas "
                            "VALUES (:id, :host, :release, :model, clock_timestamp())"
                        ),
                        self._sign(),
                    )
                    return
            for name, row in misfits.items():
                if seen.setdefault(name, row.seen) < row.seen:  # it lives: it has given a sign
                    raise self._refusal(row)
            time.sleep(_BEAT / 2)  # one that was killed is forgotten after `LIVE`

    def start(self, follow: Callable[[], None], database: Database) -> None:
        """Call `follow` at once where another replica has committed, else every `POLL` seconds.

        database: the gallery's, whose connections are cut where the server does not answer.
        """
        self._watched.append(database)
        self._threads.append(self._thread(partial(self._keep_following, follow), "follow"))

    def close(self) -> None:
        """Leave: another one leads and goes on with a run at once."""
        self._closing.set()
        self._woken.set()
        with self._given_up():
            for thread in self._threads:
                thread.join()
            with suppress(ServiceError), self._database.noting() as connection:
                for statement in (
                    "DELETE FROM cmt_replicas WHERE id = :id",
                    "UPDATE cmt_tasks SET until = clock_timestamp() WHERE holder = :id",
                ):
                    connection.execute(text(statement), {"id": self.id})
        self._database.close()

    def begin_run(self, details: Mapping[str, Any]) -> None:
        """Make a run that embeds again this replica's. Raises ModelVersionConflict for a second."""
        values = {"name": _RUN, "id": self.id, "details": json.dumps(details)}
        with self._database.noting() as connection:
            if not connection.execute(text(_TAKE), values).rowcount:
                raise ModelVersionConflict(
                    "the gallery is being embedded again already, by another replica; GET "
                    "/admin/reembed says how far it is"
                )
        self._running = True

    def note_run(self, details: Mapping[str, Any], *, ended: bool = False) -> bool:
        """Say how far this replica's run is. ended: it is no longer this replica's.

        False: another one goes on with it, since this one gave no sign of life for too long.
        """
        statement = """
            INSERT INTO cmt_tasks VALUES (:name, :id, clock_timestamp() + :left, :details)
            ON CONFLICT (name) DO UPDATE SET until = excluded.until, details = excluded.details
            WHERE cmt_tasks.holder = excluded.holder
        """  # a crash of the server may have emptied the table
        self._running = not ended
        values = {
            "name": _RUN,
            "id": self.id,
            "left": timedelta(seconds=0 if ended else LIVE),
            "details": json.dumps(details),
        }
        with self._database.noting() as connection:
            return bool(connection.execute(text(statement), values).rowcount)

    def run(self) -> Run | None:
        """The newest run of any replica, None where there was none."""
        query = """
            SELECT details, holder = :id AS mine, until > clock_timestamp() AS alive
            FROM cmt_tasks WHERE name = :name
        """
        with self._database.noting() as connection:
            return _run_of(
                connection.execute(text(query), {"name": _RUN, "id": self.id}).one_or_none()
            )

    def count_request(self, who: str, rate: str, limits: Sequence[tuple[int, int]]) -> float:
        """`shared_rates.count_request` over the replicas' database."""
        return count_request(self._database, who, rate, limits)

    def _sign(self) -> dict[str, str]:
        return {
            "id": self.id,
            "host": self._host,
            "release": self._release,
            "model": self.model,
        }

    def _misfits(self, connection: Connection) -> list[Row[Any]]:
        """Living replicas that this one cannot work beside."""
        alive = connection.execute(
            text(f"SELECT * FROM cmt_replicas WHERE seen > clock_timestamp() - {_LIVE}")
        ).all()
        others = [row for row in alive if row.release != self._release]
        differing = [row for row in alive if row.model != self.model]
        if others or not differing:
            return others
        if not inspect(connection).has_table("models"):  # both are about to make the gallery
            return differing
        retired = set(
            connection.execute(
                text("SELECT fingerprint FROM models WHERE state = 'retired'")
            ).scalars()
        )
        if self.model in retired:
            return []
        return [row for row in differing if row.model not in retired]

    def _refusal(self, row: Row[Any]) -> ServiceError:
        if row.release != self._release:
            return GalleryVersion(
                f"this is release {self._release}, and a replica on {row.host} runs release "
                f"{row.release} over the same database; stop all replicas before the first one of "
                "another release starts"
            )
        return ModelVersionConflict(
            f"this replica has the checkpoint {self.model[:12]}, and one on {row.host} searches "
            f"the same database with {row.model[:12]}; start all with the same file, and change "
            "it for all of them with `cmt reembed`"
        )

    def _thread(self, work: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread

    def _keep_following(self, follow: Callable[[], None]) -> None:
        while not self._closing.is_set():
            self._woken.wait(POLL)
            self._woken.clear()
            try:
                follow()
            except ServiceError as error:  # the gallery's keeper meets and tells it too
                log.debug("nothing could be followed: %s", error.detail)
            except Exception:
                log.exception("following the store failed")
            self._closing.wait(_REST)

    def _keep_beating(self) -> None:
        # Each statement is committed by itself: no row that the others need stays locked where
        # this process is stopped after one.
        engine = self._database.engine.execution_options(isolation_level="AUTOCOMMIT")
        while not self._closing.is_set():
            try:
                with self._given_up():
                    connection = engine.connect()
                with connection:
                    self._attend(connection)
            except (SQLAlchemyError, OSError, self._database.engine.dialect.loaded_dbapi.Error):
                pass  # every request meets it and tells it too
            except Exception:
                log.exception("giving a sign of life failed")
            self.listens = False
            self._closing.wait(_BEAT)

    def _attend(self, connection: Connection) -> None:
        """Give signs of life on a connection, and listen there between them."""
        driver: Any = connection.connection.driver_connection
        with self._given_up():
            with connection.begin():
                _make_tables(connection)  # the database may have been made anew, from a backup
            self._beat(connection)
            self.listens = self._listen(connection)
        due = time.monotonic() + _BEAT
        while not self._closing.is_set():
            left = min(due - time.monotonic(), _BEAT / 4)  # a close waits no longer
            if left > 0 and self.listens:
                try:
                    for _ in driver.notifies(timeout=left, stop_after=1):
                        self._woken.set()
                except self._database.engine.dialect.loaded_dbapi.Error:
                    connection.invalidate()  # SQLAlchemy has not seen it break
                    raise
            elif left > 0:
                self._closing.wait(left)
            if time.monotonic() >= due:
                due = time.monotonic() + _BEAT
                with self._given_up():
                    self._beat(connection)

    def _listen(self, connection: Connection) -> bool:
        """Listen, unless a pooler stands between: it lends another session to each transaction.

        Its greeting names no process of the server's, or another one's than answers.
        """
        driver: Any = connection.connection.driver_connection
        with connection.begin():
            direct = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
            if direct != driver.info.backend_pid:
                return False
            connection.execute(text(f"LISTEN {CHANNEL}"))
        self._woken.set()  # what was committed before it listened
        return True

    def _beat(self, connection: Connection) -> None:
        asked, clock = time.monotonic(), utc_now()
        with connection.begin():
            values = self._sign() | {
                "name": _LEAD,
                "details": "",
                "run": _RUN,
                "running": self._running,
            }
            row = connection.execute(_SIGN, values).one()
        took = time.monotonic() - asked
        self._leads_until = asked + LIVE if row.leads else -math.inf
        self.others = int(row.others)
        self.successor = row.successor if self.model == values["model"] else None
        run = _run_of(row)
        going = run is not None and not run.mine and run.details["state"] == "running"
        self.run_elsewhere = run if going else None
        self._compare_clocks(clock - row.moment, took)

    def _compare_clocks(self, ahead: timedelta, took: float) -> None:
        """Say once that the clocks differ. took: seconds between the looks at the two, at most."""
        seconds = ahead.total_seconds()
        self.clock_ahead = math.copysign(max(0.0, abs(seconds) - took), seconds)
        wrong = self.clocks_differ()
        if wrong is not None and not self._clock_told:
            log.warning("%s", wrong)
        self._clock_told = wrong is not None

    def clocks_differ(self) -> str | None:
        """How this machine's clock differs from the database's, with the remedy; None if hardly."""
        return clocks_differ(self.clock_ahead)

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        """Cut all connections to a server that does not let this context end in time."""
        timer = threading.Timer(_SILENT, self._cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _cut(self) -> None:
        for database in self._watched:
            database.cut()


def _make_tables(connection: Connection) -> None:
    """Where there are none; else no right to create any is needed."""
    if not inspect(connection).has_table("cmt_rates"):
        for table in _TABLES:
            connection.execute(text(table))


def _run_of(row: Row[Any] | None) -> Run | None:
    if row is None or row.details is None:
        return None
    return Run(json.loads(row.details), row.alive, row.mine)
