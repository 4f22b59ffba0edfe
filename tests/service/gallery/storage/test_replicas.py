"""Processes on one PostgreSQL database: who may join, who leads, and how soon they follow."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import event, make_url, text
from torch import Tensor

from model import CheckpointInfo
from service.errors import (
    ClockWrong,
    DatabaseUnavailable,
    GalleryFull,
    GalleryVersion,
    IndexOutOfStep,
    MemoryExhausted,
    ModelVersionConflict,
    ServiceError,
)
from service.gallery import Filters, Gallery, NewItem
from service.gallery.backup.restore import restore
from service.gallery.follower import SYNC_SECONDS
from service.gallery.storage import database
from service.gallery.storage import replicas as module
from service.gallery.storage.replicas import POLL, Replicas
from service.gallery.storage.store import Store
from service.gallery.storage.streaming import View
from service.gallery.times import utc_now
from service.images.decode import Crop
from tests.service.places import INFO, SIZE, features
from tests.service.postgres import PostgresServer, writes_with_pauses_of
from tests.service.processes import wait_for
from tests.service.replicas.network import Network
from tests.service.stores import crop

OTHER = CheckpointInfo("b" * 64, INFO.config)


def replicas_of(gallery: Gallery) -> Replicas:
    assert gallery.replicas is not None
    return gallery.replicas


@pytest.fixture
def pair(postgres_url: str, tmp_path: Path) -> Iterator[tuple[Gallery, Gallery]]:
    """Two galleries on one database."""
    with (
        closing(Gallery.open(tmp_path / "one", INFO, database_url=postgres_url)) as one,
        closing(Gallery.open(tmp_path / "two", INFO, database_url=postgres_url)) as two,
    ):
        yield one, two


def test_nobody_shares_sqlite(tmp_path: Path) -> None:
    with closing(Gallery.open(tmp_path, INFO)) as gallery:
        assert gallery.replicas is None
        assert gallery.lag == 0


def test_looks_are_closer_together_than_the_promise() -> None:
    assert 2 * POLL < SYNC_SECONDS


def test_a_replica_is_woken_by_what_another_commits(
    pair: tuple[Gallery, Gallery], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    wait_for(lambda: replicas_of(two).listens, "it does not listen")
    monkeypatch.setattr(module, "POLL", 3600.0)  # from the next look on: only a word wakes it
    time.sleep(2 * POLL)
    [item] = one.add([NewItem(crop(1), "ann")], features(1, 1))
    wait_for(lambda: two.statistics.items == 1, "nothing woke it")
    one.delete(item.id)
    wait_for(lambda: two.statistics.items == 0, "nothing woke it")


def test_one_of_several_leads_and_is_followed(pair: tuple[Gallery, Gallery]) -> None:
    one, two = pair

    def leaders() -> list[Gallery]:
        return [gallery for gallery in pair if replicas_of(gallery).leads]

    wait_for(leaders, "nobody leads")
    wait_for(lambda: replicas_of(one).others == replicas_of(two).others == 1, "they do not meet")
    [leader] = leaders()
    [other] = {*pair} - {leader}
    leader.close()
    wait_for(lambda: replicas_of(other).leads, "nobody follows the leader")


@pytest.mark.parametrize("what", ["checkpoint", "release"])
def test_a_replica_that_differs_is_refused_in_a_sentence(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "release":
        monkeypatch.setattr(module, "version", lambda _: "0.0.9")
    with closing(Gallery.open(tmp_path / "one", INFO, database_url=postgres_url)) as one:
        monkeypatch.undo()
        kind, info, remedy = {
            "release": (GalleryVersion, INFO, "stop all replicas before"),
            "checkpoint": (ModelVersionConflict, OTHER, "start all with the same file"),
        }[what]
        with pytest.raises(kind, match=remedy) as refused:
            Gallery.open(tmp_path / "two", info, database_url=postgres_url)
        assert "\n" not in refused.value.detail
        assert [version.fingerprint for version in one.versions] == [INFO.fingerprint]


def test_a_replica_that_was_killed_keeps_no_other_out(
    postgres_url: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    Gallery.open(tmp_path, INFO, database_url=postgres_url).close()
    with closing(Replicas(tmp_path, postgres_url, INFO.fingerprint)) as killed:
        killed._closing.set()  # it gives no sign any more, and does not leave
        for thread in killed._threads:
            thread.join()
        with closing(Gallery.open(tmp_path, OTHER, database_url=postgres_url)) as gallery:
            assert gallery.model == OTHER.fingerprint


def test_a_clock_that_differs_is_said_and_deletes_nothing(
    pair: tuple[Gallery, Gallery],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gallery, _ = pair
    replicas = replicas_of(gallery)

    def set_clock(*, ahead: float) -> None:
        monkeypatch.setattr(module, "utc_now", lambda: utc_now() + timedelta(seconds=ahead))
        wait_for(lambda: abs(replicas.clock_ahead - ahead) < 1, "the clocks are not compared")

    set_clock(ahead=3)
    assert gallery.retain(1) == 0
    assert "ahead of the database's" not in caplog.text
    set_clock(ahead=3600)
    wait_for(lambda: "ahead of the database's" in caplog.text, "nothing is said")
    with pytest.raises(ClockWrong, match="NTP; until then nothing is deleted"):
        gallery.retain(1)
    gallery.check()  # it searches all the same
    set_clock(ahead=-3)
    assert gallery.retain(1) == 0


def test_a_replica_follows_to_the_checkpoint_that_another_has_embedded_with(
    pair: tuple[Gallery, Gallery],
) -> None:
    one, two = pair
    y = features(1, 1)
    [item] = one.add([NewItem(crop(1), "ann")], y)

    def embed(crops: Sequence[Crop]) -> Tensor:
        run = two.run()
        assert run is not None
        assert (run.alive, run.mine, run.details["checkpoint"]) == (True, False, "b" * 64)
        with pytest.raises(ModelVersionConflict, match="already, by another replica"):
            two.reembed(OTHER, embed)
        with pytest.raises(ModelVersionConflict, match="being embedded with"):
            two.drop_version(OTHER.fingerprint)
        return y.expand(len(crops), -1, -1)

    one.reembed(OTHER, embed, decode=lambda *_: crop())
    wait_for(lambda: replicas_of(two).successor == OTHER.fingerprint, "it is not seen")
    with pytest.raises(IndexOutOfStep, match="must lie beside its own"):
        two.check()
    two.adopt(OTHER)
    two.check()
    for gallery in pair:
        [hit] = gallery.search(y[0], None, top_k=5, model=OTHER.fingerprint).hits
        assert (hit.item.id, hit.item.model) == (item.id, OTHER.fingerprint)
    run = two.run()
    assert run is not None
    assert (run.alive, run.details["state"], run.details["done"]) == (False, "done", 1)
    [late] = two.add([NewItem(crop(2))], features(1, 2), model=OTHER.fingerprint)
    wait_for(lambda: one.statistics.items == 2, "it does not follow")
    one.drop_version(INFO.fingerprint)
    assert one.get(late.id) == late


def test_a_gallery_goes_on_to_another_checkpoint_though_others_never_stop_to_enroll(
    pair: tuple[Gallery, Gallery],
) -> None:
    one, two = pair
    one.add([NewItem(crop(number)) for number in range(3)], features(3, 1))
    sizes: list[int] = []

    def enroll(number: int) -> bool:
        try:
            two.add([NewItem(crop(number))], features(1, number))
        except ModelVersionConflict:  # too late: the other checkpoint is in use
            return False
        return True

    with ThreadPoolExecutor(1) as other:
        late: list[Future[bool]] = []

        def embed(crops: Sequence[Crop]) -> Tensor:
            sizes.append(len(crops))
            late.append(other.submit(enroll, len(late) + 10))  # while these are embedded
            wait([late[-1]], timeout=0.2)  # which cannot end while nobody may write
            return features(1, 7).expand(len(crops), -1, -1)

        one.reembed(OTHER, embed, decode=lambda *_: crop())
        enrolled = 3 + sum(answer.result() for answer in late)
    assert max(sizes) < 64
    assert one.versions[-1].state == "active"
    assert one.versions[-1].embedded == len(one) == enrolled
    one.check()


def test_no_window_lets_more_through_than_the_limit_whoever_counts(
    pair: tuple[Gallery, Gallery],
) -> None:
    limits = [(1000, 3600), (25, 3600)]
    outcomes: list[float] = []

    def ask(gallery: Gallery) -> None:
        count = replicas_of(gallery).count_request
        outcomes.extend(count("key:desk", "some", limits) for _ in range(20))

    threads = [threading.Thread(target=ask, args=(pair[i % 2],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(wait == 0 for wait in outcomes) == {True: 25, False: 55}
    assert all(3600 - 60 < wait <= 3660 for wait in outcomes if wait)
    assert replicas_of(pair[0]).count_request("key:other", "some", limits) == 0


def test_a_window_is_free_again_after_its_time(pair: tuple[Gallery, Gallery]) -> None:
    one, two = map(replicas_of, pair)
    wait_for(lambda: one.count_request("key:desk", "two", [(2, 1)]) > 0, "all are let through")
    wait_for(lambda: two.count_request("key:desk", "two", [(2, 1)]) == 0, "it stays closed")


@pytest.fixture
def third(postgres_url: str, tmp_path: Path) -> Iterator[Store]:
    """The store of one more replica of the pair."""
    with closing(Store(tmp_path / "three", INFO.fingerprint, SIZE, postgres_url)) as store:
        yield store


def test_a_replica_that_stops_within_a_write_keeps_nobody_from_writing(
    pair: tuple[Gallery, Gallery], third: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeout = pytest.raises(DatabaseUnavailable, match="idle-in-transaction timeout")
    with timeout, ExitStack() as stack:
        with monkeypatch.context() as impatient:  # with that one alone
            impatient.setattr(database, "_POSTGRES_WRITES", writes_with_pauses_of(1))
            stack.enter_context(third.database.writing())  # and nothing more is heard of it
        [item] = pair[0].add([NewItem(crop(1))], features(1, 1))
    assert pair[1].get(item.id) == item


def test_a_replica_that_stops_while_it_counts_holds_up_no_other(
    pair: tuple[Gallery, Gallery], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = map(replicas_of, pair)
    stopped, goes_on = threading.Event(), threading.Event()
    here, loads = threading.get_ident(), json.loads

    def stop(text: str) -> object:  # within its transaction
        if threading.get_ident() != here:
            stopped.set()
            goes_on.wait(60)
        return loads(text)

    monkeypatch.setattr("service.gallery.storage.shared_rates.json.loads", stop)
    with ThreadPoolExecutor(1) as thread:
        counting = thread.submit(one.count_request, "key:desk", "some", [(1, 3600)])
        try:
            assert stopped.wait(60)
            assert two.count_request("key:desk", "some", [(1, 3600)]) == 0
        finally:
            goes_on.set()
        with pytest.raises(DatabaseUnavailable, match="idle-in-transaction timeout"):
            counting.result()


def test_a_number_that_is_taken_first_and_committed_last_is_not_passed_by(
    pair: tuple[Gallery, Gallery], third: Store
) -> None:
    held, opened = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        assert opened.wait(60)

    event.listen(third.database.engine, "commit", hold)
    rows = features(2, 1).flatten(1).half().numpy()
    with ThreadPoolExecutor(2) as threads:
        early = threads.submit(third.add, [NewItem(crop(1))], rows[:1])
        assert held.wait(60)  # its row has a number, and nobody sees it
        late = threads.submit(pair[0].add, [NewItem(crop(2))], features(1, 2))
        time.sleep(3 * POLL)  # several looks
        assert not late.done()
        assert [gallery.statistics.items for gallery in pair] == [0, 0]
        opened.set()
        [(_, first)], [second] = early.result(), late.result()
    for gallery in pair:
        wait_for(lambda: gallery.statistics.items == 2, "a row is passed by")  # noqa: B023
        assert [item.id for item in gallery.list(Filters(), 5).items] == [first.id, second.id]


def test_nothing_is_missed_of_many_who_write_at_once(
    pair: tuple[Gallery, Gallery], third: Store
) -> None:
    writers = [gallery.add for gallery in pair]
    rows = features(1, 1).flatten(1).half().numpy()
    lost: list[str] = []

    def write(number: int) -> None:
        new = [NewItem(crop(number))]
        if number % 3 == 2:
            third.add(new, rows)
            return
        [item] = writers[number % 3](new, features(1, number))
        if number % 5 == 0:
            pair[1 - number % 3].delete(item.id)
            lost.append(item.id)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(write, range(120)))
    assert lost
    for gallery in pair:
        wait_for(lambda: gallery.statistics.items == 120 - len(lost), "rows are missed")  # noqa: B023
        found = gallery.search(features(1, 1)[0], None, top_k=200, exhaustive=True).hits
        assert len({hit.item.id for hit in found} - {*lost}) == 120 - len(lost)
        gallery.check()


def test_what_another_enrolls_and_memory_has_no_room_for_is_said_and_the_rest_is_searched(
    pair: tuple[Gallery, Gallery], third: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("features", "chunks"):
        monkeypatch.setattr(f"service.gallery.index.{place}.CHUNK_ROWS", {"cpu": 4})
    y, gallery = features(7, 1), pair[0]
    first = gallery.add([NewItem(crop(number)) for number in range(4)], y[:4])
    wait_for(lambda: pair[1].statistics.items == 4, "it does not follow")
    assert not gallery.lacks_memory
    with monkeypatch.context() as full:
        full.setattr("service.gallery.index.features.host_room", lambda: 0)
        full.delattr(View, "stream")  # what there is no room for is not even read
        more = [NewItem(crop(number)) for number in range(4, 7)]
        third.add(more, y[4:].flatten(1).half().numpy())
        wait_for(lambda: gallery.lacks_memory, "it is not noticed")
        with pytest.raises(MemoryExhausted, match="no memory for more than 4 items; more are st"):
            gallery.check()
        with pytest.raises(GalleryFull, match="nothing is stored"):
            gallery.add([NewItem(crop(9))], features(1, 9))
        pair[1].delete(first[0].id)  # what takes no memory is followed all the same
        found = gallery.search(y[5], None, top_k=9)
        assert {hit.item.id for hit in found.hits} == {item.id for item in first[1:]}
        assert found.searched == 3
        wait_for(lambda: gallery.lag < SYNC_SECONDS + 2, "it lags behind")
    wait_for(lambda: not gallery.lacks_memory, "it does not go on")
    assert gallery.search(y[5], None, top_k=9).searched == 6
    gallery.check()


@pytest.mark.parametrize("history", ["another", "shorter"])
def test_a_server_that_lacks_what_was_committed_last_gives_no_wrong_names(
    pair: tuple[Gallery, Gallery], third: Store, history: str
) -> None:
    """As after a failover to a standby that had not received it, and gave its number again."""
    kept, lost = pair[0].add([NewItem(crop(1)), NewItem(crop(2))], features(2, 1))
    wait_for(lambda: pair[1].statistics.items == 2, "it does not follow")
    other, y = str(uuid.uuid4()), features(1, 2)
    statements = {
        "another": (
            "UPDATE features SET data = :data WHERE number = (SELECT max(number) FROM items)",
            "UPDATE items SET id = :other WHERE id = :lost",
        ),
        "shorter": ("DELETE FROM items WHERE id = :lost",),
    }[history]
    data = y.flatten(1).half().numpy().tobytes()
    with third.database.writing() as connection:
        for statement in statements:
            connection.execute(text(statement), {"other": other, "lost": lost.id, "data": data})
    there = {kept.id, other} if history == "another" else {kept.id}

    def found(gallery: Gallery) -> dict[str, float]:
        try:
            hits = gallery.search(y[0], None, top_k=5).hits
        except DatabaseUnavailable:  # while it is read again
            return {}
        return {hit.item.id: hit.distance for hit in hits}

    for gallery in pair:
        # By what the new item looks like, not by what the lost one did.
        wait_for(lambda: found(gallery).get(other, 0.0) < 0.02, "it has the old features")  # noqa: B023
        wait_for(lambda: found(gallery).keys() == there, "it does not follow")  # noqa: B023
        gallery.check()


def test_a_database_that_is_made_anew_from_a_backup_is_followed(
    pair: tuple[Gallery, Gallery], postgres_url: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    one, two = pair
    [kept] = one.add([NewItem(crop(1))], features(1, 1))
    one.backup(tmp_path / "backup")
    one.add([NewItem(crop(number)) for number in range(2, 6)], features(4, 2))
    postgres.drop_database(postgres_url)
    postgres.execute(f"CREATE DATABASE {make_url(postgres_url).database} TEMPLATE template0")
    restore(tmp_path / "backup", tmp_path / "restoring", postgres_url)

    def in_step(gallery: Gallery) -> bool:
        try:
            gallery.check()
            hits = gallery.search(features(1, 1)[0], None, top_k=9).hits
        except ServiceError:
            return False
        return [hit.item.id for hit in hits] == [kept.id]

    for gallery in pair:
        wait_for(lambda: in_step(gallery), "it does not follow")  # noqa: B023

    def counts() -> bool:  # as soon as one has made the tables of what replicas tell each other
        with suppress(DatabaseUnavailable):
            return replicas_of(two).count_request("key:desk", "some", [(1, 60)]) == 0
        return False

    wait_for(counts, "nobody counts")
    wait_for(lambda: any(replicas_of(gallery).leads for gallery in pair), "nobody leads")
    [late] = two.add([NewItem(crop(9))], features(1, 9))
    wait_for(lambda: one.statistics.items == 2, "it does not follow")
    assert one.get(late.id) == late


def test_a_database_that_was_set_read_only_is_named_so(
    postgres_url: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    Gallery.open(tmp_path, INFO, database_url=postgres_url).close()
    name = make_url(postgres_url).database
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with pytest.raises(DatabaseUnavailable, match=r"takes no writes \(.*\): it is a standby, or"):
        Gallery.open(tmp_path, INFO, database_url=postgres_url)


def test_a_network_that_stops_makes_no_old_answer_and_holds_nobody(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SILENT", 3.0)
    y = features(2, 1)
    with (
        Network(postgres_url) as network,
        closing(
            Gallery.open(tmp_path / "far", INFO, database_url=f"{network.url}?connect_timeout=2")
        ) as far,
        closing(Gallery.open(tmp_path / "near", INFO, database_url=postgres_url)) as near,
    ):
        kept, gone = near.add([NewItem(crop(1), "ann"), NewItem(crop(2), "bob")], y)

        def found() -> set[str]:
            return {hit.item.id for hit in far.search(y[1], None, top_k=5).hits}

        def answers() -> set[str]:
            try:
                return found()
            except DatabaseUnavailable:
                return set()

        wait_for(lambda: answers() == {kept.id, gone.id}, "it does not follow")
        network.stop()
        near.delete(gone.id)
        wait_for(lambda: far.lag > SYNC_SECONDS, "it seems to follow")
        with pytest.raises(DatabaseUnavailable, match="does not answer"):
            found()  # who waits for the server is given an answer, too
        with pytest.raises(DatabaseUnavailable, match="has not followed it for"):
            far.check()
        network.mend()
        wait_for(lambda: answers() == {kept.id}, "it does not come back")
        network.cut()
        near.delete(kept.id)
        wait_for(lambda: far.statistics.items == 0, "it does not come back")
        wait_for(lambda: not far.lag > SYNC_SECONDS, "it lags behind")
        far.check()
        network.stop()
        far.close()  # comes to an end, too
