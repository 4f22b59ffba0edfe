"""Shards on a Ray cluster of several node processes: equal rankings, and a node that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import RuntimeUnavailable, ShardsMissing
from service.gallery import Gallery, Options, Query
from service.scale.engine import RayEngine
from tests.service.processes import wait_for
from tests.service.scale.conftest import Nodes
from tests.service.scale.crews import (
    assert_equal,
    features,
    fill,
    info,
    new_items,
    queries,
)


def engine_on(
    nodes: Nodes, shards: int, url: str | None = None, *, partial: bool = True
) -> RayEngine:
    return RayEngine(
        shards,
        database_url=url,
        device="cpu",
        kind=None,
        address=nodes.address,
        cores=2,
        seconds=20,
        partial=partial,
    )


@contextmanager
def on_ray(
    folder: Path, nodes: Nodes, shards: int, url: str | None = None, *, partial: bool = True
) -> Iterator[Gallery]:
    """The gallery of a folder, in shards on the cluster."""
    engine = engine_on(nodes, shards, url, partial=partial)
    gallery = Gallery.open(folder, info(), candidates=40, database_url=url, follow=engine.follow)
    try:
        yield gallery
    finally:
        gallery.close()
        engine.close()


def whole(folder: Path, asked: list[Query], url: str | None = None) -> list[Any]:
    """What one process answers."""
    gallery = Gallery.open(folder, info(), candidates=40, database_url=url)
    try:
        return list(gallery.search_all(asked))
    finally:
        gallery.close()


def test_a_killed_node_loses_nothing(tmp_path: Path, nodes: Nodes) -> None:
    asked = queries(600, seed=600)
    with on_ray(tmp_path, nodes, 2) as gallery:
        fill(gallery, 600, seed=600)
        before = gallery.search_all(asked)
        assert {(one.shards_ok, one.shards_total) for one in before} == {(2, 2)}
    assert_equal(before, whole(tmp_path, asked))

    with on_ray(tmp_path, nodes, 3) as gallery:  # another number of shards
        assert_equal(gallery.search_all(asked), before)
        enrolled: dict[str, torch.Tensor] = {}
        answered: list[tuple[int | None, int | None]] = []
        missed: list[str] = []
        stopping = threading.Event()

        def load() -> None:
            rows, new = features(4000, seed=9), new_items(4000, seed=9)
            for place in range(4000):
                if stopping.is_set():
                    return
                item = gallery.add(new[place : place + 1], rows[place : place + 1])[0]
                enrolled[item.id] = rows[place]
                wanted = Query(rows[place], None, Options(top_k=3, exhaustive=place % 2 == 0))
                answer = gallery.search_all([wanted])[0]
                answered.append((answer.shards_ok, answer.shards_total))
                if answer.shards_ok == 3 and item.id not in [h.item.id for h in answer.hits]:
                    missed.append(item.id)

        loading = threading.Thread(target=load)
        loading.start()
        wait_for(lambda: len(answered) > 20, "nothing is answered")
        nodes.kill(0)
        wait_for(lambda: gallery.presence.answered < 3, "no shard is lost")
        wait_for(lambda: gallery.presence.answered == 3, "the lost shards do not come back", 90)
        time.sleep(0.5)
        stopping.set()
        loading.join()
        assert not missed
        assert {total for _, total in answered} == {3}
        assert min(ok for ok, _ in answered if ok is not None) < 3
        for item_id, row in list(enrolled.items())[::7]:
            hits = gallery.search(row, None, top_k=3).hits
            assert item_id in [hit.item.id for hit in hits]
        gallery.check()
        after = gallery.search_all(asked)
    assert_equal(after, whole(tmp_path, asked))


def test_shards_of_postgresql_on_several_machines(
    tmp_path: Path, nodes: Nodes, postgres_url: str
) -> None:
    asked = queries(300, seed=300)
    with (
        nodes.on_another_machine(),
        on_ray(tmp_path, nodes, 2, postgres_url, partial=False) as gallery,
    ):
        fill(gallery, 300, seed=300)
        answers = gallery.search_all(asked)
        assert answers[0].shards_ok == 2
        kill_a_shard()
        with pytest.raises(ShardsMissing, match="only 1 of 2 shards"):
            gallery.search_all(asked)
        wait_for(lambda: gallery.presence.answered == 2, "the lost shard does not come back", 90)
        assert_equal(gallery.search_all(asked), answers)
    assert_equal(answers, whole(tmp_path, asked, postgres_url))


def kill_a_shard() -> None:
    """SIGKILL the process of a shard, as the kernel does where memory runs out."""
    found = [line.parent for line in Path("/proc").glob("[0-9]*/cmdline") if is_shard(line)]
    assert len(found) == 2
    os.kill(int(found[0].name), signal.SIGKILL)


def is_shard(line: Path) -> bool:
    try:
        return line.read_bytes().startswith(b"ray::ShardActor")
    except OSError:  # it has ended
        return False


def test_shards_that_the_memory_does_not_hold(tmp_path: Path, nodes: Nodes) -> None:
    engine = engine_on(nodes, 100)
    told = r"100 shards of 0\.5 GB each do not fit .* 3 Ray nodes \(8\.1 GB, room for 16 of them\)"
    try:
        with pytest.raises(RuntimeUnavailable, match=told):
            Gallery.open(tmp_path, info(), follow=engine.follow)
        Gallery.open(tmp_path, info()).close()  # the folder is free
    finally:
        engine.close()


def test_sqlite_on_several_machines_is_refused(tmp_path: Path, nodes: Nodes) -> None:
    with nodes.on_another_machine():
        engine = engine_on(nodes, 2)
        told = "1 node of the Ray cluster cannot read the SQLite file .*elsewhere.*PostgreSQL"
        try:
            with pytest.raises(RuntimeUnavailable, match=told):
                Gallery.open(tmp_path, info(), follow=engine.follow)
        finally:
            engine.close()
