"""Backups of both databases: one state while writes go on, and all of it back in either."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import sqlite3
import stat
import threading
import time
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from sqlalchemy import event

from service.errors import (
    BackupInvalid,
    BackupRunning,
    DatabaseUnavailable,
    GalleryLocked,
    StorageFull,
)
from service.gallery import Filters, Gallery, ItemUpdate, NewItem, RequestKey
from service.gallery.backup.archive import Manifest, packed, peek
from service.gallery.backup.backup import Backup, offline
from service.gallery.backup.postgres_transfer import to_file
from service.gallery.backup.restore import restore
from service.gallery.storage.audit import KEY_FILE
from service.gallery.storage.database import FILE_NAME
from tests.service.gallery.storage.test_disk_full import Disk, disk  # noqa: F401 - fixture
from tests.service.places import INFO, KINDS, MakePlace, features, fill
from tests.service.processes import wait_for
from tests.service.stores import crop

OTHER = "b" * 64
BOTH = pytest.mark.parametrize("kind", KINDS)


def hits(gallery: Gallery, **options: Any) -> list[Any]:
    """Rankings of a few queries: ids, distances, places in the shortlist."""
    return [
        [
            (hit.item, hit.distance, hit.recall_rank)
            for hit in gallery.search(x, None, top_k=5, **options).hits
        ]
        for x in features(4, 99)
    ]


@pytest.mark.parametrize("target_kind", KINDS)
@BOTH
def test_all_comes_back_on_either_database(
    kind: str, target_kind: str, make_place: MakePlace, tmp_path: Path
) -> None:
    source, target, file = make_place(kind), make_place(target_kind), tmp_path / "backup.zip"
    with closing(source.open()) as gallery:
        ids = fill(gallery)
        # Another checkpoint's features, half done, and the configuration of both.
        with source.store() as store:
            store.versions.register(OTHER, {"dim": 7})
            some = sorted(map(store.number_of, ids))[:3]
            rows = features(3, 5).flatten(1)[:, :7].half().numpy()
            store.versions.add_features(OTHER, some, rows)
        expected = hits(gallery), hits(gallery, exhaustive=True), gallery.versions
        filtered = hits(gallery, filters=Filters(person_id=("person-1",)))
        gallery.backup(file, actor="key:9")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    manifest = restore(file, target.folder, target.url, actor="somebody")
    assert manifest == peek(file)
    assert (manifest.active, manifest.counts["items"]) == (INFO.fingerprint, len(ids))

    there, here = source.tables(), target.tables()
    *log, restored = here.pop("audit")
    assert log == there.pop("audit")
    assert (log[-1].actor, log[-1].action) == ("key:9", "backup")
    assert (restored.actor, restored.action) == ("somebody", "restore")
    assert here == there
    assert len(here["features"]) == len(ids) + 3
    assert target.pseudonym("person-0") == source.pseudonym("person-0")
    with closing(target.open()) as gallery:
        assert (hits(gallery), hits(gallery, exhaustive=True), gallery.versions) == expected
        assert hits(gallery, filters=Filters(person_id=("person-1",))) == filtered
        assert [item.id for item in gallery.list(Filters(), 1000).items] == ids
        known = gallery.enrolled_by(RequestKey("key-1", f"{1:064x}"))
        assert known is not None
        assert known.camera_id == "moved"
        gallery.check()
        # No number that was ever given is given again.
        (item,) = gallery.add([NewItem(crop(77))], features(1, 77))
        with target.store() as store:
            assert store.number_of(item.id) == 13
        gallery.delete(item.id)
    numbers = [row.number for row in target.tables()["changes"]]
    assert numbers == list(range(1, len(numbers) + 1))


@BOTH
def test_an_empty_gallery_comes_back(kind: str, make_place: MakePlace, tmp_path: Path) -> None:
    source, target = make_place(kind), make_place(kind)
    with closing(source.open()) as gallery:
        gallery.backup(tmp_path / "backup.zip")
    assert restore(tmp_path / "backup.zip", target.folder, target.url).counts["items"] == 0
    with closing(target.open()) as gallery:
        (item,) = gallery.add([NewItem(crop())], features(1, 0))
        with target.store() as store:
            assert store.number_of(item.id) == 1


@BOTH
def test_under_writes_it_is_one_state(kind: str, make_place: MakePlace, tmp_path: Path) -> None:
    source = make_place(kind)
    states: list[tuple[str, ...]] = [()]  # after each acknowledged write
    stop = threading.Event()

    def have_grown(beyond: int) -> bool:
        return len(states) > beyond

    def write(gallery: Gallery) -> None:
        for seed in itertools.count():
            if stop.is_set():
                return
            (item,) = gallery.add([NewItem(crop(seed), person_id=str(seed))], features(1, seed))
            states.append((*states[-1], item.id))
            if seed % 5 == 4:
                victim = states[-1][seed % 3]
                gallery.delete(victim)
                states.append(tuple(i for i in states[-1] if i != victim))

    with closing(source.open()) as gallery:
        writer = threading.Thread(target=write, args=(gallery,))
        writer.start()
        taken = []
        try:
            for turn in range(4):
                wait_for(partial(have_grown, len(states) + 5), "nothing is written")
                file, before = tmp_path / f"{turn}.zip", len(states) - 1
                gallery.backup(file)
                taken.append((file, before, len(states)))
        finally:
            stop.set()
            writer.join()
    for file, before, after in taken:
        target = make_place(kind)
        restore(file, target.folder, target.url)
        with closing(target.open()) as gallery:
            found = tuple(item.id for item in gallery.list(Filters(), 10**6).items)
            assert found in states[before : after + 1]
            gallery.check()
            tables = target.tables() if target.url else {}
        for name in tables.keys() & {"crops", "features"}:
            assert len(tables[name]) == len(found)
    assert len({file.stat().st_size for file, _, _ in taken}) > 1  # there were writes


@BOTH
def test_no_byte_of_the_erased_is_in_it(kind: str, make_place: MakePlace, tmp_path: Path) -> None:
    kept, gone = replace(crop(1), data=crop(1).data * 30), replace(crop(2), data=crop(2).data * 30)
    with closing(make_place(kind).open()) as gallery:
        (first, second) = gallery.add(
            [
                NewItem(kept, "kept-person", metadata={"note": "kept-note"}),
                NewItem(gone, "erased-person", metadata={"note": "erased-note"}),
            ],
            features(2, 3),
        )
        for name in ("erased-other", "erased-again"):
            gallery.update(second.id, ItemUpdate(person_id=name, camera_id="erased-camera"))
        gallery.delete_where("erased-again")
        gallery.backup(tmp_path / "backup.zip")
    with ZipFile(tmp_path / "backup.zip") as archive:
        held = b"".join(archive.read(name) for name in archive.namelist())

    def rows_of(seed: int) -> bytes:
        return features(2, 3)[seed].flatten().half().numpy().tobytes()

    def pieces(data: bytes) -> list[bytes]:
        # Behind the headers, which all pictures have.
        return [data[start : start + 32] for start in range(64, 512, 32)]

    # What stays is found by the same search.
    assert all(piece in held for piece in pieces(kept.data))
    assert b"kept-person" in held
    assert b"kept-note" in held
    assert first.id.encode() in held
    assert rows_of(0) in held
    assert rows_of(1) not in held
    assert not any(piece in held for piece in pieces(gone.data))
    assert b"erased-person" not in held
    assert b"erased-note" not in held
    assert b"erased-other" not in held
    assert b"erased-camera" not in held


def test_one_at_a_time_and_nothing_is_left(make_place: MakePlace, tmp_path: Path) -> None:
    place, target = make_place("sqlite"), io.BytesIO()
    with closing(place.open()) as gallery:
        fill(gallery)
        before = sorted(place.folder.rglob("*"))
        with closing(gallery.begin_backup()) as backup:
            assert sorted(place.folder.rglob("*")) == before  # the copy has no name
            assert backup.name.startswith("cmt-backup-20")
            assert backup.name.endswith("Z.zip")
            with pytest.raises(BackupRunning, match="already"):
                gallery.backup(tmp_path / "second.zip")
            blocks = list(backup)
        gallery.backup(target)
        backup.close()  # a second time
        with closing(gallery.begin_backup()) as abandoned:
            next(iter(abandoned))
        gallery.backup(tmp_path / "third.zip")
    assert not (tmp_path / "second.zip").exists()
    for data in (b"".join(blocks), target.getvalue()):
        (tmp_path / "some.zip").write_bytes(data)
        assert peek(tmp_path / "some.zip").counts["items"] == 7


def test_deletions_do_not_wait_for_a_copy(make_place: MakePlace) -> None:
    """The copy keeps SQLite's log open, which is cut once it is done."""
    reached, go_on = threading.Event(), threading.Event()

    class Paused(threading.Event):
        """Asked all along whether the copy has to stop: it pauses once it is on the way."""

        calls = 0

        def is_set(self) -> bool:
            self.calls += 1
            if self.calls == 3:
                reached.set()
                assert go_on.wait(60)
            return super().is_set()

    with closing(make_place("sqlite").open()) as gallery:
        items = gallery.add([NewItem(crop(i)) for i in range(3000)], features(3000, 0))
        database, backups = gallery._store.database, gallery._backups
        backups._closing = Paused()
        statements: list[str] = []
        copying = threading.Thread(target=lambda: backups.begin().close())
        copying.start()
        assert reached.wait(60)

        @event.listens_for(database.engine, "checkout")
        def trace(connection: sqlite3.Connection, *_: object) -> None:
            connection.set_trace_callback(statements.append)

        for item in items[:5]:
            gallery.delete(item.id)
            gallery.add([NewItem(crop())], features(1, 1))
        time.sleep(1.5)  # the keeper tries, too
        gallery.add([NewItem(crop())], features(1, 2))
        assert statements
        # Cutting the log would wait for the copy, and every writer with it.
        assert not any("wal_checkpoint" in statement for statement in statements)
        assert database.wal_pending
        assert copying.is_alive()
        go_on.set()
        copying.join()
        wait_for(lambda: not database.wal_pending, "the log is not cut")
        assert any("wal_checkpoint" in statement for statement in statements)


def test_a_closed_gallery_is_not_backed_up(make_place: MakePlace, tmp_path: Path) -> None:
    place = make_place("postgresql")
    gallery = place.open()
    fill(gallery)
    (tmp_path / "copy").mkdir()
    with (
        place.store() as store,
        store.database.reading() as source,
        pytest.raises(DatabaseUnavailable, match="closed"),
    ):
        to_file(source, tmp_path / "copy", lambda: True)
    gallery._backups.close()
    with pytest.raises(DatabaseUnavailable, match="closed"):
        gallery.backup(tmp_path / "late.zip")
    gallery.close()
    assert not (tmp_path / "late.zip").exists()
    with pytest.raises(DatabaseUnavailable, match="open it again"):
        gallery.backup(tmp_path / "late.zip")


def test_copies_of_killed_processes_are_removed(make_place: MakePlace) -> None:
    place = make_place("sqlite")
    left = place.folder / ".cmt-copy-abc"
    left.mkdir()
    (left / FILE_NAME).write_bytes(b"personal")
    place.open().close()
    assert not left.exists()


@BOTH
def test_offline(kind: str, make_place: MakePlace, tmp_path: Path) -> None:
    place, file, other = make_place(kind), tmp_path / "backup.zip", tmp_path / "other"
    other.mkdir()
    with (
        pytest.raises(DatabaseUnavailable, match="there is no gallery"),
        offline(place.folder, place.url),
    ):
        pass
    assert list(place.folder.iterdir()) in ([], [place.folder / "lock"])
    with closing(place.open()) as gallery:
        ids = fill(gallery)
        with pytest.raises(GalleryLocked, match="stop that one"), offline(place.folder, place.url):
            pass
    with offline(place.folder, place.url) as backups:
        backups.write(file, actor="me", folder=other)
    assert (peek(file).counts["items"], list(other.iterdir())) == (len(ids), [])
    assert place.tables()["audit"][-1].actor == "me"


@pytest.mark.usefixtures("disk")
def test_a_full_disk(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: F811
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with closing(Gallery.open(disk.data, INFO)) as gallery:
        for seed in range(8):
            big = replace(crop(seed), data=crop(seed).data * 330)
            gallery.add([NewItem(big)], features(1, seed))
        before = {path.name for path in disk.data.iterdir()}
        gallery.backup(elsewhere / "first.zip")
        # Room for the copy, and not for the backup beside it.
        with pytest.raises(StorageFull, match="free some") as caught:
            gallery.backup(disk.data.parent / "inside.zip")
        assert caught.value.status == 507
        assert {path.name for path in disk.data.parent.iterdir()} == {"data"}
        disk.fill()
        with pytest.raises(StorageFull, match="free some"):
            gallery.backup(elsewhere / "second.zip")
        assert {path.name for path in disk.data.iterdir()} == before
        assert [path.name for path in elsewhere.iterdir()] == ["first.zip"]
        disk.free()
        gallery.backup(elsewhere / "second.zip")
        assert len(gallery) == 8
    disk.fill()
    with pytest.raises(StorageFull, match="free some"):
        restore(elsewhere / "second.zip", disk.data / "sub")
    disk.free()
    room = shutil.disk_usage(disk.data).free
    (disk.data / "ballast").write_bytes(bytes(room - 10**6))
    with pytest.raises(StorageFull, match="free some"):  # in the middle of the copy
        restore(elsewhere / "second.zip", disk.data / "sub")
    assert not (disk.data / "sub").exists()


def test_the_database_is_readable_by_sqlite_alone(make_place: MakePlace, tmp_path: Path) -> None:
    for kind in KINDS:
        with closing(make_place(kind).open()) as gallery:
            fill(gallery)
            gallery.backup(tmp_path / f"{kind}.zip")
        with ZipFile(tmp_path / f"{kind}.zip") as archive:
            assert archive.namelist() == [FILE_NAME, KEY_FILE, "manifest.json"]
            archive.extract(FILE_NAME, tmp_path / kind)
        with closing(sqlite3.connect(tmp_path / kind / FILE_NAME)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert database.execute("PRAGMA foreign_key_check").fetchall() == []
            assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            assert database.execute("SELECT count(*) FROM secrets").fetchone() == (0,)


def test_a_backup_of_1970_is_an_archive(tmp_path: Path) -> None:
    """ZIP knows no time before 1980, and a clock without a battery starts in 1970."""
    made = datetime(1970, 1, 1, 0, 2, tzinfo=UTC)
    manifest = Manifest(created_at=made, revision="0001", active=None, counts={})
    file = tmp_path / "backup.zip"
    file.write_bytes(b"".join(packed(manifest, io.BytesIO(b"rows"), b"k" * 32)))
    with ZipFile(file) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert peek(file).created_at == made


@pytest.mark.parametrize("limit", [2**31 - 1, 100], ids=["small", "beyond 2 GB"])
def test_the_length_is_known_before(
    limit: int, make_place: MakePlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zipfile.ZIP64_LIMIT", limit)
    with closing(make_place("sqlite").open()) as gallery:
        fill(gallery)
        with closing(gallery.begin_backup()) as backup:
            file = tmp_path / "backup.zip"
            file.write_bytes(b"".join(backup))
            assert backup.size == file.stat().st_size
    peek(file)


def test_what_was_written_wrongly_gets_no_name(
    make_place: MakePlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "backup.zip"
    with closing(make_place("sqlite").open()) as gallery:
        gallery.backup(file)
        before = file.read_bytes()
        whole = Backup.__iter__
        # A disk that keeps something else than it was given.
        monkeypatch.setattr(
            Backup, "__iter__", lambda self: (b[:-9] + bytes(9) for b in whole(self))
        )
        with pytest.raises(BackupInvalid, match="damaged or cut off"):
            gallery.backup(file)
    assert file.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    names = (b"gallery \xff\xe9", b"restored \xff", b"backup \xff.zip")
    folder, there, file = (tmp_path / os.fsdecode(name) for name in names)
    with closing(Gallery.open(folder, INFO)) as gallery:
        ids = fill(gallery)
        gallery.backup(file)
    restore(file, there)
    with closing(Gallery.open(there, INFO)) as gallery:
        assert [item.id for item in gallery.list(Filters(), 1000).items] == ids
    nothing = pytest.raises(DatabaseUnavailable, match="restored %5Cxff/none/gallery")
    with nothing, offline(there / "none"):
        pass
