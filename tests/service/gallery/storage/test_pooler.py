"""Durable on a PostgreSQL server whose database is set not to be, directly and behind a pooler that
gives every transaction another session."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from model import CheckpointInfo
from service.gallery import Filters, Gallery, NewItem
from service.gallery.records import Camera
from service.gallery.storage.tables import schema
from tests.service.places import INFO, features, fill
from tests.service.processes import wait_for
from tests.service.stores import crop

OTHER = CheckpointInfo("b" * 64, INFO.config)  # which `use_everything` leaves in use

# Notes how every change of every table is committed: rows by triggers, which an event trigger puts
# on each table when it is made, and the making itself.
_WATCH = """
CREATE TABLE watched (what text, setting text, isolation text);
CREATE FUNCTION note_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO watched VALUES (TG_TABLE_NAME, current_setting('synchronous_commit'),
                                current_setting('transaction_isolation'));
    RETURN NULL;
END $$;
CREATE FUNCTION note_table() RETURNS event_trigger LANGUAGE plpgsql AS $$ DECLARE made record; BEGIN
    FOR made IN SELECT * FROM pg_event_trigger_ddl_commands() LOOP
        INSERT INTO watched VALUES (made.command_tag, current_setting('synchronous_commit'),
                                    current_setting('transaction_isolation'));
        IF made.command_tag = 'CREATE TABLE' THEN
            EXECUTE format('CREATE TRIGGER watch AFTER INSERT OR UPDATE OR DELETE ON %s
                            FOR EACH STATEMENT EXECUTE FUNCTION note_row()', made.object_identity);
        END IF;
    END LOOP;
END $$;
CREATE EVENT TRIGGER watch ON ddl_command_end WHEN TAG IN ('CREATE TABLE', 'ALTER TABLE')
    EXECUTE FUNCTION note_table();
"""


def plain(url: str) -> str:
    """The URL as libpq takes it."""
    return url.replace("postgresql+psycopg://", "postgresql://")


def lax_and_watched(url: str) -> None:
    """Give a database defaults that lose what was acknowledged, and note what they do."""
    name = make_url(url).database
    with psycopg.connect(plain(url), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
        connection.execute(
            f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'"
        )
        connection.execute(_WATCH)


def noted(url: str) -> set[tuple[str, str, str]]:
    """How each table was written, but for what replicas only tell each other."""
    query = r"SELECT DISTINCT * FROM watched WHERE what NOT LIKE 'cmt\_%'"
    with psycopg.connect(plain(url)) as connection:
        return set(connection.execute(query).fetchall())


def use_everything(folder: Path, url: str) -> None:
    """Write to every table in every way that there is."""
    with closing(Gallery.open(folder, INFO, database_url=url)) as gallery:
        kept = fill(gallery)
        gallery.put_camera(Camera("gate", "ir", "black_hot"))
        gallery.delete_camera("gate")
        gallery.reembed(
            OTHER,
            lambda crops: features(1, 5).expand(len(crops), -1, -1),
            decode=lambda *_: crop(),
        )
        gallery.drop_version(INFO.fingerprint)
        gallery.backup(folder / "backup.zip")
        gallery.delete(kept[0])


def test_every_writing_transaction_waits_for_the_disk(postgres_url: str, tmp_path: Path) -> None:
    lax_and_watched(postgres_url)
    use_everything(tmp_path, postgres_url)
    seen = noted(postgres_url)
    assert {(setting, isolation) for _, setting, isolation in seen} == {("on", "read committed")}
    every = {"CREATE TABLE", *schema.tables} - {"object_owner"}  # of an object storage only
    assert every <= {what for what, _, _ in seen}


@pytest.fixture
def pooled(postgres_url: str, port: int, tmp_path: Path) -> Iterator[str]:
    """PgBouncer before a database: three sessions, each lent for one transaction → its URL."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        reason = "a pooler is tested with PgBouncer; install it (Debian: apt-get install pgbouncer)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    lax_and_watched(postgres_url)
    with _bouncing(program, postgres_url, port, tmp_path) as url:
        yield url


@contextmanager
def _bouncing(program: str, url: str, port: int, folder: Path) -> Iterator[str]:
    server = make_url(url)
    directory = str(server.query["host"])
    config = folder / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n* = host={directory} port={server.port or 5432} user={server.username}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        "auth_type = any\npool_mode = transaction\ndefault_pool_size = 3\n"
    )
    command = [program, str(config)]
    if os.geteuid() == 0:  # it refuses to be root; the server's own user reaches its socket
        command[1:1] = ["-u", pwd.getpwuid(Path(directory, ".s.PGSQL.5432").stat().st_uid).pw_name]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    address = server.set(host="127.0.0.1", port=port, query={})

    def listens() -> bool:
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.fail(f"pgbouncer ended: {process.stderr.read()}")
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            return False
        return True

    try:
        wait_for(listens, "pgbouncer does not listen")
        yield address.render_as_string(hide_password=False)
    finally:
        process.terminate()
        process.communicate()


def test_behind_a_transaction_pooler_nothing_is_refused_or_less_durable(
    postgres_url: str, pooled: str, tmp_path: Path
) -> None:
    use_everything(tmp_path / "first", pooled)
    replicas = [Gallery.open(tmp_path / n, OTHER, database_url=pooled) for n in ("a", "b")]
    enrolled: list[str] = []
    failures: list[Exception] = []

    def work(number: int) -> None:
        gallery = replicas[number % 2]
        try:
            for step in range(15):
                y = features(1, 100 * number + step)
                (item,) = gallery.add([NewItem(crop(step), person_id=f"p{number}")], y)
                enrolled.append(item.id)
                gallery.search(y[0], None, top_k=3)
                gallery.list(Filters(person_id=(f"p{number}",)), 5)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for gallery in replicas:
        gallery.check()
        assert set(enrolled) <= {item.id for item in gallery.list(Filters(), 1000).items}
        gallery.close()
    assert failures == []
    assert len(enrolled) == 90
    assert {setting for _, setting, _ in noted(postgres_url)} == {"on"}


def test_behind_a_transaction_pooler_replicas_look_by_themselves(
    pooled: str, postgres_url: str, tmp_path: Path
) -> None:
    with (
        closing(Gallery.open(tmp_path / "one", INFO, database_url=pooled)) as one,
        closing(Gallery.open(tmp_path / "two", INFO, database_url=pooled)) as two,
        closing(Gallery.open(tmp_path / "direct", INFO, database_url=postgres_url)) as direct,
    ):
        several = [gallery.replicas for gallery in (one, two, direct)]
        for replicas in several:
            assert replicas is not None
            wait_for(lambda: replicas.others == 2, "they do not meet")  # noqa: B023
        wait_for(lambda: [r and r.listens for r in several] == [False, False, True], "who listens?")
        wait_for(lambda: sum(r is not None and r.leads for r in several) == 1, "who leads?")
        [item] = one.add([NewItem(crop(1), "ann")], features(1, 1))
        for gallery in (two, direct):
            wait_for(lambda: gallery.statistics.items == 1, "it does not follow")  # noqa: B023
        two.delete(item.id)
        for gallery in (one, direct):
            wait_for(lambda: gallery.statistics.items == 0, "it does not follow")  # noqa: B023
        counts = [r.count_request("key:desk", "two", [(2, 60)]) for r in several if r]
        assert [wait > 0 for wait in counts] == [False, False, True]
