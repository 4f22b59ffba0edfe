"""Shards on a Ray cluster of several node processes: equal rankings, and a node that is killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from service.errors import DatabaseUnavailable, RuntimeUnavailable, ShardsMissing
from service.gallery import Gallery, Options, Query
from service.scale.cluster import Cluster
from service.scale.engine import RayEngine
from service.scale.ray_crew import ShardActor
from service.scale.slice import losses_reported
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
    with (
        closing(engine_on(nodes, shards, url, partial=partial)) as engine,
        closing(
            Gallery.open(folder, info(), candidates=40, database_url=url, follow=engine.follow)
        ) as gallery,
    ):
        yield gallery


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
        erased: set[str] = set()
        answered: list[tuple[int | None, int | None]] = []
        missed: list[str] = []
        named: list[str] = []
        stopping = threading.Event()

        def load() -> None:
            rows, new = features(4000, seed=9), new_items(4000, seed=9)
            for place in range(4000):
                if stopping.is_set():
                    return
                item = gallery.add(new[place : place + 1], rows[place : place + 1])[0]
                enrolled[item.id] = rows[place]
                if place % 4 == 0:
                    gallery.delete(enrolled.popitem()[0])
                    erased.add(item.id)
                wanted = Query(rows[place], None, Options(top_k=3, exhaustive=place % 2 == 0))
                try:
                    answer = gallery.search_all([wanted])[0]
                except ShardsMissing:  # where Ray had put all on that node
                    answered.append((0, 3))
                    continue
                answered.append((answer.shards_ok, answer.shards_total))
                hits = {hit.item.id for hit in answer.hits}
                if answer.shards_ok == 3 and item.id not in hits | erased:
                    missed.append(item.id)
                named.extend(erased & hits)

        loading = threading.Thread(target=load)
        loading.start()
        wait_for(lambda: len(answered) > 20, "nothing is answered")
        nodes.kill(0)
        wait_for(lambda: any(ok is not None and ok < 3 for ok, _ in answered), "no shard is lost")
        wait_for(lambda: gallery.presence.answered == 3, "the lost shards do not come back", 90)
        time.sleep(0.5)
        stopping.set()
        loading.join()
        assert not missed
        assert not named
        assert {total for _, total in answered} == {3}
        for item_id, row in list(enrolled.items())[::7]:
            hits = gallery.search(row, None, top_k=3).hits
            assert item_id in [hit.item.id for hit in hits]
        gallery.check()
        after = gallery.search_all(asked)
    assert_equal(after, whole(tmp_path, asked))


def test_shards_of_postgresql_on_several_machines(
    tmp_path: Path, nodes: Nodes, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = queries(300, seed=300)
    failing, losing = tmp_path / "failing", tmp_path / "losing"

    class Shard(ShardActor):
        """The first of them fails, or loses its GPU, while a file is there."""

        def search(self, *arguments: Any) -> Any:
            if self._plan.part.index == 0 and failing.exists():
                raise DatabaseUnavailable("no way to the database from here")
            if self._plan.part.index == 0 and losing.exists():
                losing.unlink()
                with losses_reported():
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().search(*arguments)

    remote = ray.remote
    monkeypatch.setattr(ray, "remote", lambda _: remote(Shard))
    with (
        nodes.on_another_machine(),
        on_ray(tmp_path, nodes, 2, postgres_url, partial=False) as gallery,
    ):
        fill(gallery, 300, seed=300)
        answers = gallery.search_all(asked)
        assert answers[0].shards_ok == 2
        for trouble in (failing, losing):
            trouble.touch()
            with pytest.raises(ShardsMissing, match="only 1 of 2 shards"):
                gallery.search_all(asked)
            trouble.unlink(missing_ok=True)  # or its process has done so, and has ended
            wait_for(lambda: gallery.presence.answered == 2, "the shard does not come back", 90)
            assert_equal(gallery.search_all(asked), answers)
    assert_equal(answers, whole(tmp_path, asked, postgres_url))


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


def test_a_cluster_of_another_version(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ray.__version__
    monkeypatch.setattr(ray, "__version__", "2.9.0")
    told = rf"the cluster has Ray {theirs} on Python [\d.]+, and this process Ray 2\.9\.0 on Python"
    with pytest.raises(RuntimeUnavailable, match=told):
        Cluster(nodes.address, 1)
