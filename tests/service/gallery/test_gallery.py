"""What is acknowledged stays, what is deleted is gone: over restarts, kills and full disks."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from PIL import Image
from sqlalchemy import create_mock_engine, event, text
from torch import Tensor

from model import CheckpointInfo, CMTConfig
from service.errors import (
    CursorInvalid,
    GalleryDamaged,
    GalleryLocked,
    GalleryVersion,
    IndexOutOfStep,
    ItemNotFound,
    StorageFull,
    StorageUnwritable,
)
from service.gallery import Filters, Gallery, NewItem
from service.gallery.storage.audit import KEY_FILE
from service.gallery.storage.database import FILE_NAME
from service.gallery.storage.tables import schema
from service.images.decode import Crop, decode
from tests.paths import ROOT
from tests.service.crash.subject import CONTEXT, STARTING_SECONDS
from tests.service.places import MakePlace
from tests.service.processes import wait_for
from tests.service.stores import crop as small_crop

CONFIG = CMTConfig(input_height=96, input_width=48, dim=8, heads=2)
INFO = CheckpointInfo("a" * 64, CONFIG)
OTHER = CheckpointInfo("b" * 64, CONFIG)


def crop(seed: int = 0) -> Crop:
    """Noise: no two are equal, and no byte run of one is in another."""
    pixels = random.Random(seed).randbytes(16 * 32 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (16, 32), pixels).save(buffer, "BMP")
    return decode(buffer.getvalue())


def features(count: int, seed: int = 0) -> Tensor:
    return torch.randn(
        count, CONFIG.parts, CONFIG.dim, generator=torch.Generator().manual_seed(seed)
    )


def new(count: int, **fields: object) -> list[NewItem]:
    return [replace(NewItem(crop(i)), **fields) for i in range(count)]  # type: ignore[arg-type]


def nearest(gallery: Gallery, x: Tensor) -> str:
    return gallery.search(x, None, top_k=1).hits[0].item.id


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    opened = Gallery.open(tmp_path, INFO)
    yield opened
    opened.close()


def reopened(gallery: Gallery, folder: Path, info: CheckpointInfo = INFO) -> Gallery:
    gallery.close()
    return Gallery.open(folder, info)


def test_an_item_keeps_all_it_was_given(gallery: Gallery, tmp_path: Path) -> None:
    captured = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=timezone(timedelta(hours=2)))
    picture = crop()
    before = datetime.now(UTC)
    (item,) = gallery.add(
        [NewItem(picture, "Ann 'é'", 'cam"1;--', captured, {"deep": [1, {"x": "ü"}]})], features(1)
    )
    assert item.captured_at == captured
    assert before <= item.enrolled_at <= datetime.now(UTC)
    assert (item.person_id, item.camera_id) == ("Ann 'é'", 'cam"1;--')
    assert item.metadata == {"deep": [1, {"x": "ü"}]}
    assert (item.modality, item.modality_source, item.bit_depth) == ("rgb", "detected", 8)
    assert (item.width, item.height, item.sha256) == (16, 32, picture.sha256)
    assert item.model == INFO.fingerprint
    assert item.id[14] == "7"
    assert item.id[19] in "89ab"
    again = reopened(gallery, tmp_path)
    assert again.get(item.id) == item
    assert again.image(item.id) == (picture.data, "image/bmp")
    assert nearest(again, features(1)[0]) == item.id
    again.close()


def test_ids_sort_by_time_and_never_repeat(gallery: Gallery) -> None:
    first = gallery.add(new(50), features(50))
    time.sleep(0.002)
    second = gallery.add(new(50), features(50))
    ids = [item.id for item in first + second]
    assert len(set(ids)) == 100
    assert max(item.id for item in first) < min(item.id for item in second)


def test_a_restart_brings_gallery_and_index_back(gallery: Gallery, tmp_path: Path) -> None:
    y = features(60)
    items = gallery.add(new(60, person_id="p", camera_id="c"), y)
    gallery.delete(items[7].id)
    queries = features(5, seed=9)
    before = [gallery.search(x, None, top_k=60).hits for x in queries]
    gallery = reopened(gallery, tmp_path)
    assert len(gallery) == 59
    assert [gallery.search(x, None, top_k=60).hits for x in queries] == before
    assert gallery.search(y[7], None, top_k=60, filters=Filters(person_id=("p",))).searched == 59
    gallery.check()
    gallery.close()


def test_naive_times_and_unusable_features_change_nothing(gallery: Gallery) -> None:
    naive = NewItem(crop(), captured_at=datetime(2026, 1, 1))
    with pytest.raises(ValueError, match="offset"):
        gallery.add([*new(1), naive], features(2))
    with pytest.raises(ValueError, match="finite"):
        gallery.add(new(1), torch.full((1, CONFIG.parts, CONFIG.dim), 1e6))
    with pytest.raises(ValueError, match="for 2 items"):
        gallery.add(new(2), features(1))
    assert (len(gallery), gallery.list(Filters(), 10).total) == (0, 0)
    gallery.check()


def test_pages_cover_everything_once(gallery: Gallery) -> None:
    ids = [item.id for item in gallery.add(new(25), features(25))]
    seen: list[str] = []
    cursor = None
    while True:
        page = gallery.list(Filters(), 7, cursor)
        assert page.total == 25
        seen += [item.id for item in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
        if len(seen) == 14:
            gallery.delete(ids[0])  # what was seen already does not shift the next page
            break
    rest = gallery.list(Filters(), 100, cursor).items
    assert [*seen, *(item.id for item in rest)] == ids
    for bad in ("", "x", "YWZ0ZXI6", "YWZ0ZXI6LTE=", "🙂", "A" * 5000):
        with pytest.raises(CursorInvalid):
            gallery.list(Filters(), 7, bad)


def test_deleted_items_are_gone_at_once_and_for_good(gallery: Gallery, tmp_path: Path) -> None:
    y = features(40)
    items = gallery.add(new(40), y)
    for i in (0, 13, 39):
        gallery.delete(items[i].id)
        assert nearest(gallery, y[i]) != items[i].id
        for call in (gallery.get, gallery.image, gallery.delete):
            with pytest.raises(ItemNotFound):
                call(items[i].id)
    gallery = reopened(gallery, tmp_path)
    assert len(gallery) == 37
    assert all(nearest(gallery, y[i]) != items[i].id for i in (0, 13, 39))
    assert nearest(gallery, y[14]) == items[14].id
    gallery.close()


def test_a_person_is_erased_to_the_last_byte(gallery: Gallery, tmp_path: Path) -> None:
    """No byte run of the person's crops or features, nor the name, stays in the data folder."""
    gallery.add(new(5, person_id="kept"), features(5))
    victims = [NewItem(crop(100 + i), person_id="Erika-Mustermann") for i in range(20)]
    y = features(20, seed=4)
    gallery.add(victims, y)

    def traces() -> int:
        stored = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
        needles = [b"Erika-Mustermann"]
        needles += [item.crop.data[200:216] for item in victims]
        needles += [row.half().flatten().numpy().tobytes()[:16] for row in y]
        return sum(needle in stored for needle in needles)

    assert traces() == 41
    assert gallery.delete_where("Erika-Mustermann") == 20
    assert gallery.delete_where("Erika-Mustermann") == 0
    assert traces() == 0
    assert len(gallery) == 5


def test_many_deletes_rebuild_the_index(gallery: Gallery, tmp_path: Path) -> None:
    y = features(1500)
    items = gallery.add([NewItem(crop(), person_id=f"p{i % 3}") for i in range(1500)], y)
    assert gallery.delete_where("p1") == 500
    for i in range(0, 1500, 100):
        if i % 3 != 1:
            assert nearest(gallery, y[i]) == items[i].id
    (late,) = gallery.add(new(1), features(1, seed=77))
    assert nearest(gallery, features(1, seed=77)[0]) == late.id
    everything = gallery.search(y[1], None, top_k=1500)
    assert len(everything.hits) == everything.searched == 1001
    gallery.check()
    only = gallery.search(y[1], None, top_k=1500, filters=Filters(person_id=("p2",)))
    assert {hit.item.person_id for hit in only.hits} == {"p2"}
    assert len(only.hits) == 500


def test_another_checkpoint_never_mixes(gallery: Gallery, tmp_path: Path) -> None:
    y = features(10)
    old = gallery.add(new(10), y)
    gallery = reopened(gallery, tmp_path, OTHER)
    assert (gallery.awaiting, len(gallery)) == (10, 10)
    assert gallery.search(y[0], None, top_k=10).hits == []
    (fresh,) = gallery.add(new(1), features(1))
    hits = gallery.search(y[0], None, top_k=10).hits
    assert [hit.item.id for hit in hits] == [fresh.id]
    assert gallery.get(old[0].id).model == INFO.fingerprint
    gallery.delete(old[0].id)
    assert (gallery.awaiting, len(gallery)) == (9, 10)
    gallery.check()
    gallery = reopened(gallery, tmp_path, INFO)
    assert gallery.awaiting == 1
    assert {hit.item.id for hit in gallery.search(y[0], None, top_k=99).hits} == {
        item.id for item in old[1:]
    }
    gallery.close()


# --- the data folder ---


def test_unknown_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "gallery.sqlite3").write_bytes(b"not yours")
    gallery = Gallery.open(tmp_path, INFO)
    gallery.add(new(3), features(3))
    gallery.check()
    gallery.close()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "sub" / "gallery.sqlite3").read_bytes() == b"not yours"
    assert {path.name for path in tmp_path.iterdir()} == {
        *("notes.txt", "sub", "lock"),
        *(FILE_NAME, KEY_FILE),
    }


def test_a_second_opening_is_refused(gallery: Gallery, tmp_path: Path) -> None:
    with pytest.raises(GalleryLocked, match="in use"):
        Gallery.open(tmp_path, INFO)
    with ProcessPoolExecutor(1, CONTEXT) as elsewhere, pytest.raises(GalleryLocked, match="in use"):
        elsewhere.submit(Gallery.open, tmp_path, INFO).result()
    gallery.close()
    Gallery.open(tmp_path, INFO).close()


def hold_with_children(folder: Path, told: Connection) -> None:
    """Open a gallery, and start a program and a fork that inherit what is open."""
    _gallery = Gallery.open(folder, INFO)
    program = subprocess.Popen(["sleep", "600"], close_fds=False)
    forked = os.fork()
    if forked:
        told.send((program.pid, forked))
    time.sleep(600)


def test_the_lock_dies_with_its_process_though_children_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)  # also of the process that is killed
    folder = tmp_path / "data"
    ours, theirs = CONTEXT.Pipe()
    holder = CONTEXT.Process(target=hold_with_children, args=(folder, theirs))
    holder.start()
    assert ours.poll(STARTING_SECONDS)
    children: tuple[int, int] = ours.recv()
    try:
        with pytest.raises(GalleryLocked):
            Gallery.open(folder, INFO)
        holder.kill()
        wait_for(lambda: not Path(f"/proc/{holder.pid}").exists(), "it does not die")
        for pid in children:
            os.kill(pid, 0)  # still there
        Gallery.open(folder, INFO).close()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnwritable, match="cannot be written"):
        Gallery.open(tmp_path / "file" / "data", INFO)


# --- the database ---


def test_a_newer_schema_is_refused_and_kept(gallery: Gallery, tmp_path: Path) -> None:
    gallery.add(new(2), features(2))
    gallery.close()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        known = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(GalleryVersion, match="newer release"):
        Gallery.open(tmp_path, INFO)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", known)
    connection.close()
    again = Gallery.open(tmp_path, INFO)
    assert len(again) == 2
    again.close()


@pytest.mark.parametrize("damage", ["garbage", "truncated", "short features"])
def test_a_damaged_database_is_a_sentence(gallery: Gallery, tmp_path: Path, damage: str) -> None:
    gallery.add(new(200), features(200))
    gallery.close()
    file = tmp_path / FILE_NAME
    good = file.read_bytes()
    if damage == "garbage":
        file.write_bytes(b"no database at all" * 500)
    elif damage == "truncated":
        file.write_bytes(good[: len(good) // 2])
    else:
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE features SET data = x'00' WHERE number = 7")
        connection.close()
    with pytest.raises(GalleryDamaged, match="restore a backup"):
        Gallery.open(tmp_path, INFO)
    file.write_bytes(good)
    Gallery.open(tmp_path, INFO).close()  # the lock was given free


def test_a_full_disk_refuses_enrollment_and_loses_nothing(tmp_path: Path) -> None:
    """SQLite is told how many pages there are; reads go on, and writes once there are more."""
    gallery = Gallery.open(tmp_path, INFO)
    y = features(400)
    kept = gallery.add(new(50), y[:50])
    engine = gallery._store.database.engine
    pages = [0]

    def limit(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages[0]}")

    event.listen(engine, "checkout", limit)
    with engine.connect() as connection:
        pages[0] = connection.execute(text("PRAGMA page_count")).scalar_one() + 5
    with pytest.raises(StorageFull) as caught:
        gallery.add(new(300), y[50:350])
    assert (caught.value.status, caught.value.code) == (507, "storage_full")
    assert len(gallery) == gallery.list(Filters(), 1).total == 50
    gallery.check()
    assert nearest(gallery, y[7]) == kept[7].id
    pages[0] = 1 << 20
    more = gallery.add(new(300), y[50:350])
    assert nearest(gallery, y[349]) == more[-1].id
    gallery.close()
    again = Gallery.open(tmp_path, INFO)
    assert len(again) == 350
    again.close()


def test_an_index_out_of_step_is_noticed(gallery: Gallery) -> None:
    items = gallery.add(new(5), features(5))
    gallery.check()
    gallery._follower.shard.mark_deleted(
        [gallery._store.number_of(items[0].id)]
    )  # behind the store's back
    with pytest.raises(IndexOutOfStep, match="restart"):
        gallery.check()


def test_postgresql_speaks_the_same_tables() -> None:
    """The tables compile for PostgreSQL; a real server is another test's matter."""
    statements: list[str] = []
    engine = create_mock_engine(
        "postgresql+psycopg://", executor=lambda sql, *_: statements.append(str(sql))
    )
    schema.create_all(engine, checkfirst=False)
    assert len(statements) >= 3


# --- kills and threads ---


def test_threads_never_see_a_deleted_item_or_miss_an_enrolled_one(
    gallery: Gallery, tmp_path: Path
) -> None:
    """Two writers, a person-eraser and four searchers at once, against acknowledged facts."""
    acknowledged: dict[str, tuple[str, Tensor]] = {}  # id → person, features
    finished: list[str] = []  # persons that get no further item
    deleted: set[str] = set()
    guard, stop = threading.Lock(), threading.Event()
    failures: list[BaseException] = []
    searches = [0]

    def guarded(work: object) -> threading.Thread:
        def run() -> None:
            try:
                while not stop.is_set():
                    work()  # type: ignore[operator]
            except BaseException as error:
                failures.append(error)
                stop.set()

        return threading.Thread(target=run)

    def writer(name: int) -> object:
        dice, seeds = random.Random(name), iter(range(name * 10**6, (name + 1) * 10**6))

        def write() -> None:
            first = next(seeds)
            y = torch.cat(
                [features(1, seed) for seed in (first, *islice(seeds, dice.randrange(30)))]
            )
            person = f"person {first}"
            items = gallery.add([NewItem(crop(), person_id=person)] * len(y), y)
            with guard:
                acknowledged.update((i.id, (person, row)) for i, row in zip(items, y, strict=True))
            if dice.random() < 0.5:
                victim = dice.choice(items).id
                with guard:
                    del acknowledged[victim]
                gallery.delete(victim)
                with guard:
                    deleted.add(victim)
            with guard:
                finished.append(person)

        return write

    def erase() -> None:
        time.sleep(0.05)
        with guard:
            if not finished:
                return
            person = finished.pop(random.randrange(len(finished)))
            mine = [i for i, (whose, _) in acknowledged.items() if whose == person]
            for item_id in mine:
                del acknowledged[item_id]
        assert gallery.delete_where(person) == len(mine)
        with guard:
            deleted.update(mine)

    def search() -> None:
        with guard:
            gone = set(deleted)
            sample = random.sample(sorted(acknowledged.items()), min(1, len(acknowledged)))
        x = sample[0][1][1] if sample else features(1)[0]
        result = gallery.search(x, None, top_k=20, exhaustive=random.random() < 0.3)
        ids = [hit.item.id for hit in result.hits]
        assert len(ids) == len(set(ids))
        assert not gone & set(ids)
        for item_id, _ in sample:
            with guard:
                still = item_id in acknowledged
            assert not still or ids[0] == item_id
        searches[0] += 1

    threads = [guarded(writer(0)), guarded(writer(1)), guarded(erase)]
    threads += [guarded(search) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: failures or (searches[0] > 200 and len(deleted) > 20), "they do not work")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    gallery.check()
    count = len(gallery)
    gallery = reopened(gallery, tmp_path)
    assert len(gallery) == count == len(acknowledged)
    gallery.close()


def test_what_a_crash_left_of_erased_items_is_cut_at_the_next_start(tmp_path: Path) -> None:
    folder, crashed = tmp_path / "data", tmp_path / "crashed"
    mark = b"zq-marker-person"
    opened = Gallery.open(folder, INFO)
    opened.add(new(1, person_id=mark.decode()), features(1))
    database = opened._store.database
    assert database.truncate_log()  # the row is in the file by now
    database.copying = True  # as during a backup, when the log cannot be cut
    assert opened.delete_where(mark.decode()) == 1
    shutil.copytree(folder, crashed)
    database.copying = False
    opened.close()

    def holding() -> list[str]:
        return [f.name for f in crashed.iterdir() if f.is_file() and mark in f.read_bytes()]

    assert holding()
    again = Gallery.open(crashed, INFO)
    wait_for(lambda: not holding(), "the log is not cut")
    again.close()
    assert holding() == []


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_of_simultaneous_deletions_of_an_item_one_succeeds(
    make_place: MakePlace, tmp_path: Path, kind: str
) -> None:
    """In one process, and on PostgreSQL among two replicas."""
    place = make_place(kind)
    galleries = [Gallery.open(place.folder, INFO, database_url=place.url)]
    if kind == "postgresql":
        galleries.append(Gallery.open(tmp_path / "replica", INFO, database_url=place.url))
    items = galleries[0].add([NewItem(small_crop(i)) for i in range(5)], features(5))
    for item in items:
        together = threading.Barrier(8)

        def delete(number: int, item_id: str, together: threading.Barrier) -> str:
            together.wait()
            try:
                galleries[number % len(galleries)].delete(item_id, actor=f"key:{number}")
            except ItemNotFound:
                return "not found"
            return "deleted"

        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(delete, n, item.id, together) for n in range(8)]
            outcomes = sorted(call.result() for call in calls)
        assert outcomes == ["deleted"] + ["not found"] * 7
    entries = galleries[0].audit(100).entries
    deleted = sorted(str(entry.subject) for entry in entries if entry.action == "delete")
    assert deleted == sorted(item.id for item in items)
    for gallery in galleries:
        gallery.close()
