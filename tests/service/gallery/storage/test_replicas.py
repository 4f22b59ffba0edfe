"""Processes on one PostgreSQL database: who may join, who leads, and how soon they follow."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from torch import Tensor

from model import CheckpointInfo
from service.errors import (
    ClockWrong,
    DatabaseUnavailable,
    GalleryVersion,
    IndexOutOfStep,
    ModelVersionConflict,
)
from service.gallery import Gallery, NewItem
from service.gallery.follower import SYNC_SECONDS
from service.gallery.storage import replicas as module
from service.gallery.storage.replicas import POLL, Replicas
from service.gallery.times import utc_now
from service.images.decode import Crop
from tests.service.places import INFO, features
from tests.service.postgres import PostgresServer
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
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
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
    assert [one.count_request("key:desk", "two", [(2, 1)]) for _ in range(2)] == [0, 0]
    assert two.count_request("key:desk", "two", [(2, 1)]) > 0
    wait_for(lambda: two.count_request("key:desk", "two", [(2, 1)]) == 0, "it stays closed")


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

        wait_for(lambda: found() == {kept.id, gone.id}, "it does not follow")
        network.stop()
        near.delete(gone.id)
        wait_for(lambda: far.lag > SYNC_SECONDS, "it seems to follow")
        with pytest.raises(DatabaseUnavailable, match="does not answer"):
            found()  # who waits for the server is given an answer, too
        with pytest.raises(DatabaseUnavailable, match="has not followed it for"):
            far.check()
        network.mend()

        def answers() -> set[str]:
            try:
                return found()
            except DatabaseUnavailable:
                return set()

        wait_for(lambda: answers() == {kept.id}, "it does not come back")
        network.cut()
        near.delete(kept.id)
        wait_for(lambda: far.statistics.items == 0, "it does not come back")
        wait_for(lambda: not far.lag > SYNC_SECONDS, "it lags behind")
        far.check()
        network.stop()
        far.close()  # comes to an end, too
