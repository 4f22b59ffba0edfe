"""Queries that come together are ranked as one batch, each with its own outcome."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest
import torch
from torch import Tensor

from service.embedding.embedder import Embedder
from service.errors import ModelVersionConflict
from service.gallery import Gallery, NewItem, Options, Query, SearchResult
from service.images.decode import decode
from service.kit.precedence import give_way, turn
from service.pipeline.search_batcher import EmbeddedQuery, Ranking, Search, SearchBatcher
from tests.paths import ROOT


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    with closing(Embedder(ROOT / "examples/compact.safetensors", "cpu", "torch")) as one:
        yield one


@pytest.fixture(scope="module")
def features(embedder: Embedder) -> Tensor:
    files = sorted((ROOT / "tests/data/synth-sysu-mini").glob("cam*/*/*"))[:40]
    crops = [decode(file.read_bytes()) for file in files]
    return embedder.embed(crops)


@pytest.fixture(scope="module")
def gallery(
    tmp_path_factory: pytest.TempPathFactory, embedder: Embedder, features: Tensor
) -> Iterator[Gallery]:
    file = next((ROOT / "tests/data/synth-sysu-mini").glob("cam1/*/*"))
    crop = decode(file.read_bytes())
    with closing(Gallery.open(tmp_path_factory.mktemp("gallery"), embedder.info)) as one:
        one.add([NewItem(crop, person_id=f"p{i}") for i in range(len(features))], features)
        yield one


class Watched:
    """A gallery that notes its batches, and holds exhaustive ones until it is told to go on."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self.batches: list[int] = []
        self.hold = threading.Event()

    def search_all(
        self, queries: Sequence[Query], *, model: str | None = None
    ) -> Sequence[SearchResult]:
        self.batches.append(len(queries))
        if any(query.options.exhaustive for query in queries):
            with turn(long=True):
                while not self.hold.wait(0.001):
                    give_way()
        return self._gallery.search_all(queries, model=model)


@pytest.fixture
def watched(gallery: Gallery) -> Iterator[Watched]:
    one = Watched(gallery)
    yield one
    one.hold.set()


def ranked(
    watched: Watched, embedder: Embedder, jobs: Sequence[tuple[Tensor, Search]]
) -> list[Ranking | BaseException]:
    async def run() -> list[Ranking | BaseException]:
        batcher = SearchBatcher(watched)  # type: ignore[arg-type]
        try:
            return await asyncio.gather(
                *(
                    batcher.rank(EmbeddedQuery(embedder, x[None], "ir", search))
                    for x, search in jobs
                ),
                return_exceptions=True,
            )
        finally:
            batcher.close()

    return asyncio.run(run())


def best(outcome: Ranking | BaseException) -> str | None:
    assert isinstance(outcome, Ranking)
    return outcome.result.hits[0].item.person_id


def test_those_that_wait_are_ranked_together_as_each_would_be_alone(
    watched: Watched, embedder: Embedder, features: Tensor
) -> None:
    searches = [Search(top_k=5), Search(top_k=3, modulation=False), Search(group_by="person_id")]
    jobs = [(features[i], searches[i % 3]) for i in range(30)]
    outcomes = ranked(watched, embedder, jobs)
    assert max(watched.batches) > 20
    for job, outcome in zip(jobs, outcomes, strict=True):
        (alone,) = ranked(watched, embedder, [job])
        assert isinstance(outcome, Ranking)
        assert isinstance(alone, Ranking)
        hits, lone = outcome.result.hits, alone.result.hits
        assert [hit.item.id for hit in hits] == [hit.item.id for hit in lone]
        # γ and β of a batch round otherwise than those of one.
        distances = [hit.distance for hit in lone]
        assert [hit.distance for hit in hits] == pytest.approx(distances, abs=1e-5)
        assert outcome.similarities == pytest.approx(alone.similarities, abs=1e-4)
        assert all(0 <= s <= 1 for s in outcome.similarities if s is not None)


def test_one_that_fails_fails_alone(watched: Watched, embedder: Embedder, features: Tensor) -> None:
    broken = features[3].clone()
    broken[0, 0] = torch.nan
    jobs = [(broken if i == 3 else features[i], Search(modulation=False)) for i in range(8)]
    outcomes = ranked(watched, embedder, jobs)
    assert isinstance(outcomes[3], ValueError)
    assert "not finite" in str(outcomes[3])
    assert [best(outcomes[i]) for i in (0, 1, 7)] == ["p0", "p1", "p7"]


def test_exhaustive_queries_hold_up_no_others(
    watched: Watched, embedder: Embedder, features: Tensor
) -> None:
    async def run() -> None:
        batcher = SearchBatcher(watched)  # type: ignore[arg-type]
        slow = EmbeddedQuery(
            embedder, features[:1], "ir", Search(exhaustive=True, modulation=False)
        )
        waiting = asyncio.create_task(batcher.rank(slow))
        for i in range(5):
            quick = EmbeddedQuery(embedder, features[i : i + 1], "ir", Search(modulation=False))
            assert best(await asyncio.wait_for(batcher.rank(quick), 60)) == f"p{i}"
        assert not waiting.done()
        watched.hold.set()
        assert best(await waiting) == "p0"
        batcher.close()

    asyncio.run(run())


def test_one_that_is_cancelled_is_not_ranked(
    watched: Watched, embedder: Embedder, features: Tensor
) -> None:
    async def run() -> None:
        batcher = SearchBatcher(watched)  # type: ignore[arg-type]
        seen = EmbeddedQuery(embedder, features[:1], "ir", Search(exhaustive=True))
        first = asyncio.create_task(batcher.rank(seen))
        while not watched.batches:
            await asyncio.sleep(0.001)
        gone = asyncio.create_task(batcher.rank(seen))
        last = asyncio.create_task(batcher.rank(seen))
        await asyncio.sleep(0)
        gone.cancel()
        watched.hold.set()
        assert (await first).result.hits == (await last).result.hits
        assert gone.cancelled()
        batcher.close()

    asyncio.run(run())
    assert watched.batches == [1, 1]


def test_an_exhaustive_search_ends_with_the_last_request_that_wants_it(
    watched: Watched, embedder: Embedder, features: Tensor
) -> None:
    async def run() -> None:
        batcher = SearchBatcher(watched)  # type: ignore[arg-type]
        seen = EmbeddedQuery(embedder, features[:1], "ir", Search(exhaustive=True))
        gone = asyncio.create_task(batcher.rank(seen))
        while not watched.batches:
            await asyncio.sleep(0.001)
        next_one = asyncio.create_task(batcher.rank(seen))
        await asyncio.sleep(0)
        gone.cancel()
        while len(watched.batches) < 2:  # which waits for the first to end, though it is held
            await asyncio.sleep(0.001)
        assert gone.cancelled()
        watched.hold.set()
        assert best(await next_one) is not None
        batcher.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_features_of_another_checkpoint_are_refused(
    gallery: Gallery, embedder: Embedder, features: Tensor
) -> None:
    with pytest.raises(ModelVersionConflict, match="embed the image again"):
        gallery.search_all([Query(features[0], None, Options(top_k=1))], model="another")


def test_where_its_thread_is_gone_a_query_fails_and_does_not_wait_for_ever(
    watched: Watched, embedder: Embedder, features: Tensor
) -> None:
    async def run() -> None:
        batcher = SearchBatcher(watched)  # type: ignore[arg-type]
        batcher.close()
        await asyncio.wait_for(
            batcher.rank(EmbeddedQuery(embedder, features[:1], "ir", Search())), 60
        )

    with pytest.raises(RuntimeError, match="shutdown"):
        asyncio.run(run())
    assert watched.batches == []
