"""Files of the gallery that are moved, replaced or removed while it is open: nothing is
acknowledged that a restart would not find."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from service.errors import ServiceError, StorageMoved
from service.gallery import Act, Filters, Gallery, ItemUpdate, NewItem
from service.gallery.storage.database import FILE_NAME, Database
from service.gallery.storage.folder_lock import FolderLock
from service.gallery.storage.group_commit import GroupCommit
from service.gallery.storage.store import Store
from service.gallery.storage.tables import items
from tests.service.places import INFO, MakePlace, features
from tests.service.processes import wait_for
from tests.service.stores import MODEL, SIZE, all_of, crop, new, rows

Accident = Callable[[Path], Callable[[], None] | None]  # → how it is undone, if it can be


def move(path: Path) -> Callable[[], None]:
    away = path.with_name(f"{path.name}.away")
    path.rename(away)

    def back() -> None:
        if path.is_dir():
            shutil.rmtree(path)
        away.replace(path)

    return back


def folder_moved(folder: Path) -> Callable[[], None]:
    return move(folder)


def another_folder_in_its_place(folder: Path) -> Callable[[], None]:
    back = move(folder)
    shutil.copytree(f"{folder}.away", folder)
    return back


def link_turned(folder: Path) -> Callable[[], None]:
    """The folder's name becomes a link to a copy, as where a release is switched."""
    back = move(folder)
    copy = folder.with_name("copy")
    shutil.copytree(f"{folder}.away", copy)
    folder.symlink_to(copy)

    def undo() -> None:
        folder.unlink()
        back()

    return undo


def file_moved(name: str) -> Accident:
    return lambda folder: move(folder / name)


def file_removed(name: str) -> Accident:
    return lambda folder: (folder / name).unlink()


def file_restored_over(name: str) -> Accident:
    """A copy takes its place by a rename, as rsync and tar do it."""

    def replace(folder: Path) -> Callable[[], None]:
        back = move(folder / name)
        shutil.copy(folder / f"{name}.away", folder / name)
        return back

    return replace


def folder_removed(folder: Path) -> None:
    shutil.rmtree(folder)


ACCIDENTS = {
    "folder moved": folder_moved,
    "another folder": another_folder_in_its_place,
    "link turned": link_turned,
    "folder removed": folder_removed,
    **{f"{name} moved": file_moved(name) for name in (FILE_NAME, f"{FILE_NAME}-wal", "lock")},
    **{f"{name} removed": file_removed(name) for name in (FILE_NAME, f"{FILE_NAME}-wal", "lock")},
    f"{FILE_NAME} restored": file_restored_over(FILE_NAME),
    f"{FILE_NAME}-wal restored": file_restored_over(f"{FILE_NAME}-wal"),
}


@pytest.mark.parametrize("accident", ACCIDENTS.values(), ids=list(ACCIDENTS))
def test_no_write_is_acknowledged_that_a_restart_would_not_find(
    tmp_path: Path, accident: Accident
) -> None:
    folder = tmp_path / "data"
    gallery = Gallery.open(folder, INFO)
    item, other = gallery.add([NewItem(crop(i), person_id="p") for i in range(2)], features(2, 1))
    gallery.check()
    undo = accident(folder)
    writes: list[Callable[[], object]] = [
        lambda: gallery.add([NewItem(crop(2))], features(1, 2)),
        lambda: gallery.update(item.id, ItemUpdate(person_id="q")),
        lambda: gallery.delete(item.id),
        lambda: gallery.delete_where("p"),
        lambda: gallery.record(Act("key:1", "query")),
        lambda: gallery.reembed(INFO, lambda _: features(1, 3)),
        gallery.check,
    ]
    for write in writes:
        with pytest.raises(StorageMoved, match="is no longer the one") as caught:
            write()
        assert (caught.value.status, caught.value.code) == (503, "storage_moved")
        assert str(tmp_path) not in caught.value.detail
    # Nothing is left where the gallery was, so that it can be moved back.
    if undo is not None and accident is folder_moved:
        assert not folder.exists()
    if undo is None:
        gallery.close()
        return
    undo()
    gallery.check()
    (third,) = gallery.add([NewItem(crop(2))], features(1, 2))
    for reopened in (False, True):
        if reopened:
            gallery.close()
            gallery = Gallery.open(folder, INFO)
        listed = gallery.list(Filters(), 9).items
        assert [found.id for found in listed] == [item.id, other.id, third.id]
        assert [found.person_id for found in listed] == ["p", "p", None]
    gallery.close()


def test_a_move_between_the_commit_and_its_answer_is_no_success(tmp_path: Path) -> None:
    """What was committed then is in the folder that was moved; the caller cannot count on it."""
    folder = tmp_path / "data"
    lock = FolderLock(folder)
    database = Database(folder, lock=lock)
    commits = GroupCommit(database)

    def move_last(connection: object) -> None:
        assert connection is not None
        folder.rename(tmp_path / "away")  # the check before the transaction has passed

    with pytest.raises(StorageMoved, match="moved or removed"):
        commits.run(move_last)
    (tmp_path / "away").rename(folder)
    commits.run(lambda connection: connection.execute(items.delete()))
    database.close()
    lock.release()


def test_new_connections_never_open_what_is_in_the_place_of_the_database(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    store = Store(folder, MODEL, SIZE)
    store.add(new(2), rows(2))
    back = folder_moved(folder)
    folder.mkdir()
    store.database.engine.dispose()  # as where a connection was given up
    with pytest.raises(StorageMoved):
        store.count()
    assert list(folder.iterdir()) == []
    back()
    assert store.count() == 2
    store.close()


def test_what_only_a_removed_log_held_is_saved(tmp_path: Path) -> None:
    """Items that were acknowledged before the log was removed survive a kill after that."""
    gallery = Gallery.open(tmp_path / "data", INFO)
    gallery.add([NewItem(crop(i)) for i in range(3)], features(3, 1))
    (tmp_path / "data" / f"{FILE_NAME}-wal").unlink()

    def saved() -> bool:
        copy = tmp_path / "copy"  # as the disk is after a kill
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        shutil.copy(tmp_path / "data" / FILE_NAME, copy / FILE_NAME)
        with (
            suppress(ServiceError),  # it was copied while it was written
            closing(Store(copy, INFO.fingerprint, INFO.config.embedding_size)) as store,
        ):
            return len(all_of(store)) == 3
        return False

    wait_for(saved, "the log's content is not copied")
    gallery.close()


def test_the_lock_is_watched_where_the_rows_are_on_a_server(make_place: MakePlace) -> None:
    place = make_place("postgresql")
    gallery = place.open()
    back = file_moved("lock")(place.folder)
    assert back is not None
    with pytest.raises(StorageMoved, match="lock"):
        gallery.add([NewItem(crop())], features(1, 1))
    with pytest.raises(StorageMoved, match="lock"):
        gallery.check()
    back()
    gallery.add([NewItem(crop())], features(1, 1))
    gallery.check()
    gallery.close()


def test_the_log_of_a_database_behind_a_link_is_watched(tmp_path: Path) -> None:
    """It lies beside the file, not beside the link."""
    home, link = tmp_path / "home", tmp_path / "link.sqlite3"
    home.mkdir()
    Store(home, MODEL, SIZE).close()
    link.symlink_to(home / FILE_NAME)
    (tmp_path / "data").mkdir()
    with closing(Store(tmp_path / "data", MODEL, SIZE, f"sqlite:///{link}")) as store:
        store.audit.append(Act("key:1", "query"))
        back = move(home / f"{FILE_NAME}-wal")
        with pytest.raises(StorageMoved, match="log"):
            store.audit.append(Act("key:1", "query"))
        back()
        store.audit.append(Act("key:1", "query"))
        assert len(store.audit.page(9).entries) == 2


def test_a_database_elsewhere_is_watched_too(tmp_path: Path) -> None:
    home = tmp_path / "home"
    url = f"sqlite:///{home / 'other.sqlite3'}"
    gallery = Gallery.open(tmp_path / "data", INFO, database_url=url)
    for path in (home / "other.sqlite3", home / "lock", home):
        back = move(path)
        with pytest.raises(StorageMoved):
            gallery.add([NewItem(crop())], features(1, 1))
        back()
    gallery.add([NewItem(crop())], features(1, 1))
    gallery.close()
