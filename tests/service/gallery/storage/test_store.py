"""The store on both databases: what goes in comes out, changes and erasures are whole."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import delete, make_url, select, update
from sqlalchemy.exc import DBAPIError

from model.labels import LabelError
from service.errors import (
    CursorInvalid,
    DatabaseUnavailable,
    GalleryDamaged,
    GalleryLocked,
    IdempotencyConflict,
    ItemNotFound,
    StorageUnwritable,
)
from service.gallery.records import Camera, Filters, ItemUpdate, NewItem, RequestKey
from service.gallery.storage.audit import KEY_FILE, Act
from service.gallery.storage.database import FILE_NAME, known_revisions
from service.gallery.storage.folder_lock import FolderLock
from service.gallery.storage.store import Store
from service.gallery.storage.tables import (
    AUDIT_TRIGGERS,
    REVISION,
    audit,
    changes,
    schema,
    secrets,
)
from tests.service.postgres import PostgresServer
from tests.service.stores import MODEL, SIZE, OpenStore, all_of, crop, new, rows


def everything(store: Store, table: object) -> str:
    """All that a table holds, as text."""
    with store.database.reading() as connection:
        return repr(connection.execute(select(table)).all())  # type: ignore[call-overload]


def test_the_tables_are_those_of_the_migrations(store: Store) -> None:
    with store.database.reading() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, schema) == []
        assert context.get_current_revision() == REVISION == max(known_revisions())


def test_an_item_keeps_all_it_was_given(open_store: OpenStore) -> None:
    captured = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC)
    given = NewItem(crop(), "Ann 'é'", 'cam"1;--', captured, {"deep": [1, {"x": "ü"}]})
    ((number, item),) = open_store().add([given], rows(1))
    again = open_store()
    assert again.get(item.id) == item == again.fetch([number])[number]
    assert (item.person_id, item.camera_id, item.captured_at) == (
        given.person_id,
        given.camera_id,
        captured,
    )
    assert item.metadata == given.metadata
    assert again.image(item.id) == (given.crop.data, "image/png")
    assert all_of(again)[number][-1] == rows(1)[0].tolist()
    assert again.list(Filters(person_id=("Ann 'é'",)), 5, None).items == [item]


def test_a_key_belongs_to_one_content(store: Store) -> None:
    request = RequestKey("key", "c" * 64)
    ((_, item),) = store.add(new(1, request=request), rows(1))
    assert store.enrolled_by(request) == item
    other = RequestKey("key", "d" * 64)
    with pytest.raises(IdempotencyConflict):
        store.enrolled_by(other)
    assert store.enrolled_by_each([RequestKey("free", "c" * 64), request]) == {"key": item}
    assert isinstance(store.enrolled_by_each([other])["key"], IdempotencyConflict)
    with pytest.raises(IdempotencyConflict, match="same moment"):
        store.add([*new(1), NewItem(crop(), request=request)], rows(2))
    assert store.count() == 1


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (rows(1), "for 2 items"),
        (rows(2, size=SIZE + 1), f"{SIZE} numbers"),
        (rows(2).reshape(2, 3, 4), "shape"),
        (np.full((2, SIZE), np.nan, np.float16), "not finite"),
        (np.full((2, SIZE), np.inf, np.float16), "not finite"),
    ],
)
def test_unusable_features_change_nothing(
    store: Store, bad: np.typing.NDArray[np.float16], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        store.add(new(2), bad)
    assert store.count() == 0


# --- updates ---


def test_an_update_changes_what_is_given_and_nothing_else(open_store: OpenStore) -> None:
    store = open_store()
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    ((_, before),) = store.add(
        new(1, person_id="p", camera_id="c", captured_at=moment, metadata={"a": 1}), rows(1)
    )
    after = store.update(before.id, ItemUpdate(person_id=None, metadata={"b": 2}), actor="key-1")
    assert (after.person_id, after.metadata) == (None, {"b": 2})
    assert (after.camera_id, after.captured_at) == ("c", moment)
    later = store.update(before.id, ItemUpdate(camera_id="d", captured_at=None))
    assert (later.camera_id, later.captured_at, later.metadata) == ("d", None, {"b": 2})
    assert open_store().get(before.id) == later
    assert [e.details for e in store.audit.page(9).entries] == [
        {"fields": ["camera_id", "captured_at"]},
        {"fields": ["person_id", "metadata"]},
    ]


def test_an_update_of_nothing_leaves_no_trace(store: Store) -> None:
    ((_, item),) = store.add(new(1), rows(1))
    assert store.update(item.id, ItemUpdate()) == item
    assert store.audit.page(9).entries == []
    with store.view() as view:
        assert view.position().change == 0
    for changed in (ItemUpdate(), ItemUpdate(person_id="p")):
        with pytest.raises(ItemNotFound, match="no item has the id"):
            store.update("unknown", changed)


# --- erasure and audit ---


def test_deletions_count_items_once_and_tell_of_themselves(store: Store) -> None:
    added = store.add(new(5, person_id="p"), rows(5))
    numbers = [number for number, _ in added]
    assert store.delete([numbers[1], numbers[3], numbers[1], 10**6], actor="key-1") == 2
    assert store.delete([numbers[1]]) == 0
    assert sorted(all_of(store)) == [numbers[0], numbers[2], numbers[4]]
    entries = store.audit.page(9).entries
    assert {(e.actor, e.action, e.subject) for e in entries} == {
        ("key-1", "delete", added[i][1].id) for i in (1, 3)
    }
    with store.view() as view:
        assert view.position().change == 2


def test_an_erased_person_is_named_nowhere(store: Store, tmp_path: Path) -> None:
    kept = store.add(new(3, person_id="kept"), rows(3))
    gone = store.add(new(3, person_id="Erika-Mustermann"), rows(3))
    store.update(kept[0][1].id, ItemUpdate(person_id="Erika-Mustermann"))
    store.delete([gone[0][0]])
    erased = store.erase_person("Erika-Mustermann", actor="key-1")
    assert erased == [kept[0][0], gone[1][0], gone[2][0]]
    assert store.erase_person("Erika-Mustermann") == []
    assert sorted(all_of(store)) == [kept[1][0], kept[2][0]]
    log = store.audit.page(9).entries
    assert log[1].subject == store.audit.pseudonym("Erika-Mustermann")
    assert log[1].details == {"items": 3}
    for table in (changes, audit):
        assert "Erika" not in everything(store, table)
    for path in tmp_path.iterdir():
        assert b"Erika-Mustermann" not in path.read_bytes(), path


def test_a_person_renamed_by_an_update_leaves_no_byte(tmp_path: Path) -> None:
    store = Store(tmp_path, MODEL, SIZE)
    ((_, item),) = store.add(new(1, person_id="Erika-Mustermann"), rows(1))
    store.update(item.id, ItemUpdate(person_id=None))
    assert not any(b"Erika-Mustermann" in path.read_bytes() for path in tmp_path.iterdir())
    store.close()


def lose_key(store: Store, folder: Path) -> None:
    if store.database.sqlite:
        (folder / KEY_FILE).unlink()
    else:
        with store.database.writing() as connection:
            connection.execute(delete(secrets))


def test_pseudonyms_need_the_key_and_stay_the_same(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    assert (tmp_path / KEY_FILE).exists() == store.database.sqlite
    if store.database.sqlite:
        assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    pseudonym = store.audit.pseudonym("p")
    assert pseudonym != store.audit.pseudonym("q")
    assert open_store().audit.pseudonym("p") == pseudonym
    lose_key(store, tmp_path)
    assert open_store().audit.pseudonym("p") != pseudonym


def test_a_lost_key_is_made_anew_and_told(
    open_store: OpenStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(open_store()) as store:
        lose_key(store, tmp_path)
    with closing(open_store()) as store:  # there is no entry yet whose pseudonyms it could break
        assert store.audit.page(10).entries == []
        assert "is missing and made anew" not in caplog.text
        store.audit.append(Act("key-1", "query", persons=("p",)))
        lose_key(store, tmp_path)
    for _ in range(2):
        with closing(open_store()) as store:
            entries = store.audit.page(10).entries
            assert [(e.actor, e.action) for e in entries] == [
                ("system", "new_key"),
                ("key-1", "query"),
            ]
    assert caplog.text.count("is missing and made anew") == 1
    assert "put the key back from a backup" in caplog.text


@pytest.mark.parametrize("key", [b"", b"short", b"x" * 31, b"long" * 9, bytes(32)])
def test_what_is_no_key_is_refused_at_the_start(
    key: bytes, open_store: OpenStore, tmp_path: Path
) -> None:
    with closing(open_store()) as store:
        if store.database.sqlite:
            (tmp_path / KEY_FILE).write_bytes(key)
        else:
            with store.database.writing() as connection:
                connection.execute(update(secrets).values(data=key))
    with pytest.raises(GalleryDamaged, match="put it back from a backup, or remove it"):
        open_store()


def test_a_key_that_would_never_come_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / KEY_FILE)
    with pytest.raises(GalleryDamaged, match="is not 32 random bytes"):
        Store(tmp_path, MODEL, SIZE)
    (tmp_path / KEY_FILE).unlink()
    (tmp_path / KEY_FILE).mkdir()
    with pytest.raises(GalleryDamaged, match="is not 32 random bytes"):
        Store(tmp_path, MODEL, SIZE)


def test_the_log_is_paged_newest_first(store: Store) -> None:
    for i in range(5):
        store.audit.append(Act("key-1", "query", None, {"n": i}), Act("key-1", "extra"))
    seen: list[int] = []
    cursor = None
    while True:
        page = store.audit.page(3, cursor)
        seen += [entry.number for entry in page.entries]
        assert all(entry.moment <= datetime.now(UTC) for entry in page.entries)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert len(seen) == 10
    assert seen == sorted(seen, reverse=True)
    assert json.dumps(store.audit.page(2).entries[1].details) == '{"n": 4}'
    with pytest.raises(CursorInvalid):
        store.audit.page(3, "nonsense")


# --- where the database is ---


def test_a_file_in_use_is_refused_by_whatever_way(tmp_path: Path) -> None:
    """A second data folder, a URL, a link: the lock lies beside the database file."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    lock = FolderLock(home)  # as a Gallery holds it
    store = Store(home, MODEL, SIZE)
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(home)
    (elsewhere / "other.sqlite3").symlink_to(home / FILE_NAME)
    for url in (
        f"sqlite:///{home / FILE_NAME}",
        f"sqlite:///{tmp_path / 'link' / FILE_NAME}",
        f"sqlite:///{elsewhere / 'other.sqlite3'}",
    ):
        with pytest.raises(GalleryLocked, match="in use"):
            Store(elsewhere, MODEL, SIZE, url)
    store.close()
    lock.release()
    second = Store(elsewhere, MODEL, SIZE, f"sqlite:///{home / FILE_NAME}")
    with pytest.raises(GalleryLocked):
        FolderLock(home)
    second.close()
    FolderLock(home).release()


@pytest.mark.parametrize(
    "url",
    [
        *("", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://host/db", "postgresql://h/d"),
        *("sqlite:///file:x.sqlite3?uri=true", "sqlite:///x.sqlite3?mode=ro"),
    ],
)
def test_other_databases_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="postgresql\\+psycopg"):
        Store(tmp_path, MODEL, SIZE, url)


def test_a_file_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(StorageUnwritable, match="check the path, owner and mount"):
        Store(tmp_path, MODEL, SIZE)


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    store = Store(tmp_path, MODEL, SIZE)
    with store.database.engine.connect() as connection:  # what root meets on a read-only mount
        connection.exec_driver_sql("PRAGMA query_only = ON")
    with pytest.raises(StorageUnwritable, match="cannot be written"):
        store.add(new(1), rows(1))
    store.close()


def test_a_server_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://me:secret@/gallery?host={tmp_path}"
    with pytest.raises(DatabaseUnavailable, match="does not answer") as caught:
        Store(tmp_path, MODEL, SIZE, url)
    assert "secret" not in caught.value.detail


def test_a_server_that_comes_back_is_used_again(
    postgres: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    store = Store(tmp_path, MODEL, SIZE, postgres_url)
    store.add(new(2), rows(2))
    postgres.kill()
    for call in (store.count, lambda: store.add(new(1), rows(1))):
        with pytest.raises(DatabaseUnavailable, match="try again later"):
            call()
    postgres.start()
    store.add(new(1), rows(1))
    assert store.count() == 3
    store.close()


def test_a_transaction_cut_in_the_middle_is_unavailable(
    postgres: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    store = Store(tmp_path, MODEL, SIZE, postgres_url)
    store.add(new(2), rows(2))

    def read_while_cut() -> None:
        with store.database.reading() as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            postgres.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
            connection.exec_driver_sql("SELECT 1")

    with pytest.raises(DatabaseUnavailable, match="does not answer"):
        read_while_cut()
    assert store.count() == 2
    store.close()


# --- labels, cameras, an audit log that only grows ---


def test_labels_that_look_the_same_are_one(store: Store) -> None:
    ((_, item),) = store.add(new(1, person_id="zoe\u0308", camera_id="Ho\u0302f"), rows(1))
    assert (item.person_id, item.camera_id) == ("zo\u00eb", "H\u00f4f")
    for name in ("zo\u00eb", "zoe\u0308"):
        assert store.list(Filters(person_id=(name,)), 5, None).items == [item]
        assert store.list(Filters(exclude_camera_id=("Ho\u0302f",)), 5, None).items == []
    moved = store.update(item.id, ItemUpdate(person_id="A\u030ake", camera_id=None))
    assert (moved.person_id, moved.camera_id) == ("\u00c5ke", None)
    assert store.erase_person("\u212bke") == [1]


@pytest.mark.parametrize("bad", [" zoe", "zo\u200be", "zo\ne", "z" * 129, ""])
def test_a_text_that_is_no_label_changes_nothing(store: Store, bad: str) -> None:
    ((_, item),) = store.add(new(1, person_id="zoe"), rows(1))
    for changed in (ItemUpdate(person_id=bad), ItemUpdate(camera_id=bad)):
        with pytest.raises(LabelError):
            store.add(new(2, **changed.fields), rows(2))
        with pytest.raises(LabelError):
            store.update(item.id, changed)
        with pytest.raises(LabelError):
            store.cameras.put(Camera(bad))
    with pytest.raises(LabelError):
        store.label("person_id", bad)
    assert store.erase_person(bad) == []
    assert store.list(Filters(person_id=(bad,)), 5, None).items == []
    assert store.list(Filters(), 5, None).items == [item]
    assert store.cameras.list() == []


def test_texts_that_no_database_holds_match_nothing(store: Store) -> None:
    store.add(new(2, camera_id="gate"), rows(2))
    for text in ("\0", "a\0b", "\ud800"):
        assert store.list(Filters(camera_id=(text,)), 5, None).total == 0
        assert store.list(Filters(exclude_camera_id=(text,)), 5, None).total == 2
        with pytest.raises(LabelError):
            store.label("camera_id", text)


def test_polarity_is_stored_with_the_item_and_its_crop(store: Store) -> None:
    hot = [NewItem(replace(crop(1), polarity="black_hot")), NewItem(crop(2))]
    added = store.add(hot, rows(2))
    assert [item.polarity for _, item in added] == ["black_hot", None]
    assert [store.get(item.id) for _, item in added] == [item for _, item in added]
    store.versions.register("b" * 64)
    assert [c.polarity for block in store.versions.missing("b" * 64) for c in block] == [
        "black_hot",
        None,
    ]
    assert {c.polarity for c in store.versions.sample(MODEL, 5)[0]} == {"black_hot", None}


def test_a_camera_is_known_at_once_and_until_it_is_deleted(open_store: OpenStore) -> None:
    store = open_store()
    assert store.cameras.find(["gate/ä"]) == {}
    put = store.cameras.put(Camera("gate/a\u0308", "ir", "black_hot"), actor="key:1")
    store.cameras.put(Camera("Gate", "rgb"))
    assert put == Camera("gate/ä", "ir", "black_hot")
    other = open_store()
    assert other.cameras.list() == [Camera("Gate", "rgb"), put]
    assert other.cameras.find(["gate/ä", "nothing"]) == {"gate/ä": put}
    changed = store.cameras.put(Camera("gate/ä", None, "white_hot"))
    assert other.cameras.find({"gate/ä"}) == {"gate/ä": changed}
    assert other.cameras.delete("gate/ä", actor="key:2")
    assert not other.cameras.delete("gate/ä")
    assert store.cameras.list() == [Camera("Gate", "rgb")]
    entries = [(e.actor, e.action, e.details) for e in store.audit.page(9).entries[::-1]]
    assert entries[0] == (
        *("key:1", "camera"),
        {"camera_id": "gate/ä", "modality": "ir", "polarity": "black_hot"},
    )
    assert entries[-1] == ("key:2", "camera", {"camera_id": "gate/ä"})
    assert len(entries) == 4


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'nobody'",
        "UPDATE audit SET details = '{}' WHERE number = 1",
        "DELETE FROM audit",
        "DELETE FROM audit WHERE number = 1",
        "REPLACE INTO audit (number, moment, actor, action, details) VALUES (1, 0, 'x', 'y', '{}')",
        "INSERT INTO audit (number, moment, actor, action, details) VALUES (1, 0, 'x', 'y', '{}') "
        "ON CONFLICT (number) DO UPDATE SET actor = 'x'",
        "TRUNCATE audit",
    ],
)
def test_the_database_refuses_to_change_the_audit_log(store: Store, statement: str) -> None:
    first = "REPLACE" if store.shared else "TRUNCATE"
    if statement.startswith(first):
        pytest.skip("no statement of this database")
    store.add(new(2, person_id="zoe"), rows(2))
    store.audit.append(Act("key:1", "query"), Act("key:1", "list"))
    before = store.audit.page(9)
    with (
        pytest.raises(DBAPIError, match="append-only"),
        store.database.engine.begin() as connection,
    ):
        connection.exec_driver_sql(statement)
    assert store.audit.page(9) == before
    assert len(store.erase_person("zoe")) == 2  # which only adds an entry
    assert store.audit.page(9).entries[1:] == before.entries


def test_the_triggers_are_those_that_a_backup_may_have(tmp_path: Path) -> None:
    Store(tmp_path, MODEL, SIZE).close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
        assert dict(connection.execute(query)) == AUDIT_TRIGGERS


def test_a_password_comes_from_a_file(
    postgres: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    address = make_url(postgres_url)
    [(hba,)] = postgres.execute("SHOW hba_file")
    rules = Path(hba).read_text()
    postgres.execute("CREATE ROLE keeper LOGIN PASSWORD 'ä secret: /@ one'")
    postgres.execute(f"ALTER DATABASE {address.database} OWNER TO keeper")
    Path(hba).write_text(f"local all keeper scram-sha-256\n{rules}")
    postgres.execute("SELECT pg_reload_conf()")
    file = tmp_path / "password"
    url = address.set(username="keeper").update_query_dict({"password_file": str(file)})
    text = url.render_as_string(hide_password=False)

    def opened() -> None:
        Store(tmp_path / "data", MODEL, SIZE, text).close()

    try:
        with pytest.raises(DatabaseUnavailable, match=r"cannot be read from \S+ \(No such file"):
            opened()
        file.write_text("\n")
        with pytest.raises(DatabaseUnavailable, match="holds no password"):
            opened()
        file.write_text("another one")
        with pytest.raises(DatabaseUnavailable, match="does not answer") as raised:
            opened()
        assert "another" not in str(raised.value)
        file.write_text("ä secret: /@ one\n")
        opened()
        text = url.set(password="twice").render_as_string(hide_password=False)
        with pytest.raises(DatabaseUnavailable, match="several passwords"):
            opened()
    finally:
        Path(hba).write_text(rules)
        postgres.execute("SELECT pg_reload_conf()")
        postgres.execute(f"ALTER DATABASE {address.database} OWNER TO postgres")
        postgres.execute("DROP OWNED BY keeper")
        postgres.drop_database(postgres_url)
        postgres.execute("DROP ROLE keeper")
