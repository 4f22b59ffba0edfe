"""Where a backup is restored and where it is refused, and a restore that is killed."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect

from service.errors import BackupInvalid, DatabaseUnavailable, GalleryLocked, GalleryNotEmpty
from service.gallery import Filters, NewItem
from service.gallery.backup.restore import restore
from service.gallery.storage.audit import KEY_FILE
from service.gallery.storage.database import FILE_NAME
from tests.paths import ROOT
from tests.service.crash.subject import kill_after
from tests.service.places import KINDS, MakePlace, Place, features, fill
from tests.service.stores import crop

BOTH = pytest.mark.parametrize("kind", KINDS)


@BOTH
def test_only_an_empty_gallery_is_filled(kind: str, make_place: MakePlace, tmp_path: Path) -> None:
    source, used, file = make_place(kind), make_place(kind), tmp_path / "backup.zip"
    with closing(source.open()) as gallery:
        fill(gallery)
        gallery.backup(file)
    with closing(used.open()) as gallery:
        gallery.add([NewItem(crop())], features(1, 0))
        with pytest.raises(GalleryLocked, match="stop that one"):
            restore(file, used.folder, used.url)
    before = used.tables()
    with pytest.raises(GalleryNotEmpty, match="give "):
        restore(file, used.folder, used.url)
    assert used.tables() == before
    # One that a service has opened once has a key and a version, which would be lost.
    opened = make_place(kind)
    opened.open().close()
    with pytest.raises(GalleryNotEmpty, match="give "):
        restore(file, opened.folder, opened.url)


def test_a_key_of_another_gallery_stays(make_place: MakePlace, tmp_path: Path) -> None:
    source, target, file = make_place("sqlite"), make_place("sqlite"), tmp_path / "backup.zip"
    with closing(source.open()) as gallery:
        fill(gallery)
        gallery.backup(file)
    (target.folder / KEY_FILE).write_bytes(b"another")
    with pytest.raises(GalleryNotEmpty, match="key of another"):
        restore(file, target.folder)
    assert sorted(path.name for path in target.folder.iterdir()) == [KEY_FILE, "lock"]
    shutil.copy(source.folder / KEY_FILE, target.folder)
    (target.folder / f"{FILE_NAME}-wal").write_bytes(b"of a lost database")
    with pytest.raises(GalleryNotEmpty, match="wal is there"):
        restore(file, target.folder)
    (target.folder / f"{FILE_NAME}-wal").unlink()
    (target.folder / "index").mkdir()
    (target.folder / "index" / "MANIFEST").write_text("of a lost gallery")
    restore(file, target.folder)
    assert not (target.folder / "index" / "MANIFEST").exists()


def test_an_sqlite_file_elsewhere(make_place: MakePlace, tmp_path: Path) -> None:
    source, file = make_place("sqlite"), tmp_path / "backup.zip"
    elsewhere = Place(tmp_path / "data", f"sqlite:///{tmp_path / 'other' / 'name.db'}")
    with closing(source.open()) as gallery:
        ids = fill(gallery)
        gallery.backup(file)
    restore(file, *elsewhere)
    with closing(elsewhere.open()) as gallery:
        assert [item.id for item in gallery.list(Filters(), 1000).items] == ids
    assert elsewhere.pseudonym("x") == source.pseudonym("x")
    with pytest.raises(DatabaseUnavailable, match="none that a gallery can live in"):
        restore(file, tmp_path / "new", "mysql://somewhere")


@BOTH
def test_a_killed_restore_leaves_an_empty_gallery(
    kind: str, make_place: MakePlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)  # also of the process that is killed
    source, file = make_place(kind), tmp_path / "backup.zip"
    with closing(source.open()) as gallery:
        for seed in range(20):
            big = replace(crop(seed), data=crop(seed).data * 3000)
            gallery.add([NewItem(big)], features(1, seed))
        gallery.backup(file)
    outcomes = set()
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        target = make_place(kind)
        kill_after(delay, restore, file, *target)
        try:
            restore(file, target.folder, target.url)
            outcomes.add("empty")
        except GalleryNotEmpty:
            outcomes.add("whole")
        assert not list(target.folder.glob(".cmt-copy-*"))
        with closing(target.open()) as gallery:
            assert len(gallery) == 20
            gallery.check()
        assert target.pseudonym("x") == source.pseudonym("x")
    assert "empty" in outcomes


def test_a_server_without_the_tables_stays_as_it_is(make_place: MakePlace, tmp_path: Path) -> None:
    target, file = make_place("postgresql"), tmp_path / "backup.zip"
    with closing(make_place("sqlite").open()) as gallery:
        gallery.backup(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BackupInvalid, match="damaged"):
        restore(file, target.folder, target.url)
    assert target.url is not None
    engine = create_engine(target.url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()
