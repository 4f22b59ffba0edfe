"""FAISS's indexes on a GPU, with a stand-in for FAISS's GPU part that has its limits."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from model import CMTConfig, Modulation, part_distances
from service.gallery.feed import Stored
from service.gallery.index import recall
from service.gallery.index.figures import Figures, FiguresError
from service.gallery.index.gpu_index import GpuIndex, IndexKindError, check_kind, obstacles
from service.gallery.index.recall_index import GPU_KINDS, choose_kind, index_bytes
from service.gallery.index.shard import SearchRequest, Shard
from service.gallery.records import Filters, IndexKind

PARTS, DIM, COUNT = 3, 16, 2500
WIDTH = (PARTS + 1) * DIM
CONFIG = CMTConfig(input_height=96, input_width=48, parts=PARTS, dim=DIM, heads=2)


class Resources:
    """As `StandardGpuResources`: for one thread at a time."""

    def __init__(self) -> None:
        self.temporary: int | None = None
        self.pinned: int | None = None
        self.used = threading.Lock()

    def setTempMemory(self, size: int) -> None:  # noqa: N802
        self.temporary = size

    def setPinnedMemory(self, size: int) -> None:  # noqa: N802
        self.pinned = size


class Driver:
    """A GPU's index, computed by one of the CPU; it refuses what the real one refuses."""

    made: list[Driver]

    def __init__(self, kind: str, resources: Resources, index: Any, config: Any) -> None:
        assert isinstance(resources, Resources)
        self.kind, self.resources, self.config = kind, resources, config
        self._index = index
        self.most_fetched = 0
        self.nprobe = 1
        Driver.made.append(self)

    @property
    def ntotal(self) -> int:
        return int(self._index.ntotal)

    @property
    def is_trained(self) -> bool:
        return bool(self._index.is_trained) and not (self.kind == "cagra" and not self.ntotal)

    def _alone(self, call: Callable[[], Any]) -> Any:
        assert self.resources.used.acquire(blocking=False), "two threads use one resources object"
        try:
            return call()
        finally:
            self.resources.used.release()

    def train(self, vectors: Any) -> None:
        self._check(vectors)
        fill = self._index.add if self.kind == "cagra" else self._index.train
        self._alone(lambda: fill(vectors))

    def add(self, vectors: Any) -> None:
        self._check(vectors)
        if self.kind == "cagra":
            raise RuntimeError("adding vectors is not supported by GpuIndexCagra.")
        self._alone(lambda: self._index.add(vectors))

    def search(self, queries: Any, k: int, *, params: Any = None) -> Any:
        self._check(queries)
        if not 0 < k <= 2048:
            raise RuntimeError(f"GPU index only supports min/max-K selection up to 2048 ({k})")
        if getattr(params, "sel", None) is not None:
            raise RuntimeError("this GPU index does not support a selector")
        if self.kind == "cagra":
            assert k <= params.itopk_size <= 512
            assert params.itopk_size % 32 == 0
        self.most_fetched = max(self.most_fetched, k)
        if self.kind == "ivf":
            assert 0 < self.nprobe <= 2048
            self._index.nprobe = self.nprobe
        return self._alone(lambda: self._index.search(queries, k))

    @staticmethod
    def _check(vectors: Any) -> None:
        assert vectors.dtype == np.float32
        assert vectors.flags.c_contiguous
        assert np.abs(vectors).max() <= 65_504, "fp16 does not hold it"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> type[Driver]:
    """FAISS with a GPU part, cuVS included."""
    product = faiss.METRIC_INNER_PRODUCT
    fp16, codes = faiss.ScalarQuantizer.QT_fp16, faiss.ScalarQuantizer.QT_8bit

    def flat(resources: Any, size: int, config: Any) -> Driver:
        assert config.useFloat16
        index = faiss.IndexScalarQuantizer(size, fp16, product)
        return Driver("flat", resources, index, config)

    def ivf(
        resources: Any, size: int, lists: int, code: int, metric: int, residual: bool, config: Any
    ) -> Driver:
        assert (code, metric, residual) == (codes, product, True)
        index = faiss.index_factory(size, f"IVF{lists},SQ8", metric)
        return Driver("ivf", resources, index, config)

    def cagra(resources: Any, size: int, metric: int, config: Any) -> Driver:
        return Driver("cagra", resources, faiss.IndexFlatIP(size), config)

    for name, value in {
        "StandardGpuResources": Resources,
        "GpuIndexFlatConfig": SimpleNamespace,
        "GpuIndexFlatIP": flat,
        "GpuIndexIVFScalarQuantizerConfig": SimpleNamespace,
        "GpuIndexIVFScalarQuantizer": ivf,
        "GpuIndexCagraConfig": SimpleNamespace,
        "GpuIndexCagra": cagra,
        "SearchParametersCagra": SimpleNamespace,
    }.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    Driver.made = []
    return Driver


def features(count: int = COUNT, seed: int = 0) -> Tensor:
    return torch.randn(count, PARTS, DIM, generator=torch.Generator().manual_seed(seed))


def stored(y: Tensor, first: int = 0) -> Stored:
    numbers = list(range(first, first + len(y)))
    return Stored(
        numbers=numbers,
        persons=[f"p{n % 50}" for n in numbers],
        cameras=[f"c{n % 3}" for n in numbers],
        modalities=["rgb"] * len(y),
        captured=[None] * len(y),
        features=y.flatten(1).half().numpy(),
    )


def query(seed: int = 1) -> tuple[Tensor, Modulation]:
    gamma = 1 + 0.5 * features(1, seed)[0, :1]
    return features(1, seed + 100)[0], Modulation(gamma, 0.3 * features(1, seed + 200)[0, :1])


def search(shard: Shard, seed: int, count: int, filters: Filters | None = None) -> list[int]:
    x, modulation = query(seed)
    [found] = shard.search(
        [SearchRequest(x, modulation, count, count, filters=filters or Filters())]
    )
    numbers: list[int] = found.numbers.tolist()
    return numbers


def ranking(y: Tensor, seed: int) -> list[int]:
    x, modulation = query(seed)
    doubles = Modulation(*(p.double() for p in modulation))
    distances = part_distances(x[None].double(), y.half().double(), doubles)[0].sum(1)
    return np.argsort(distances.numpy(), kind="stable").tolist()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_every_kind_finds_the_near_and_as_many_as_match(
    kind: IndexKind, driver: type[Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a filter leaves so few that they would be scanned at once, as on a CPU."""
    monkeypatch.setattr(recall, "_SHORTLISTS", 0)
    monkeypatch.setattr(recall, "_SELECTIVE", 0)
    y = features()
    shard = Shard(CONFIG, "cuda", kind)
    shard.add(stored(y))
    shard.wait()
    statistics = shard.statistics()
    assert (statistics.index, statistics.indexed) == (kind, COUNT)
    deleted = set(range(0, 400, 2))
    shard.mark_deleted(sorted(deleted))
    shard.wait()
    for seed in range(3):
        order = [number for number in ranking(y, seed) if number not in deleted]
        wide = search(shard, seed, 300)
        assert len(wide) == 300
        assert not deleted & set(wide)
        assert len(set(wide[:10]) & set(order[:10])) >= (3 if "IVF" in kind else 9)
        third = [number for number in order if number % 3 == 1]
        filters = Filters(camera_id=("c1",))
        for count in (60, len(third) - 1, len(third) + 5):
            assert len(search(shard, seed, count, filters)) == min(count, len(third))
        few = [number for number in order if number % 50 == 7]
        assert search(shard, seed, 100, Filters(person_id=("p7",))) == few
        assert len(search(shard, seed, 2200)) == 2200  # more than it can fetch
    assert 300 < max(one.most_fetched for one in driver.made) <= 2048
    shard.close()


@pytest.mark.usefixtures("faked")
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_later_rows_are_found_and_taken_in(kind: IndexKind, driver: type[Driver]) -> None:
    y = features(COUNT + 1300)
    shard = Shard(CONFIG, "cuda", kind)
    shard.add(stored(y[:COUNT]))
    shard.wait()
    shard.add(stored(y[COUNT : COUNT + 50], COUNT))
    assert shard.statistics().indexed == COUNT
    x = y[COUNT + 20]
    [found] = shard.search([SearchRequest(x, Modulation.identity(1, DIM), 5, 100)])
    assert found.numbers[0] == COUNT + 20
    shard.add(stored(y[COUNT + 50 :], COUNT + 50))
    shard.wait()
    assert shard.statistics().indexed == len(y)
    assert len(driver.made) == (2 if kind == "GPU-CAGRA" else 1)  # which cannot be extended
    shard.close()


@pytest.mark.usefixtures("faked")
def test_threads_share_an_index_and_no_resources_object(driver: type[Driver]) -> None:
    y = features()
    shard = Shard(CONFIG, "cuda", "GPU-Flat")
    shard.add(stored(y))
    shard.wait()
    alone = [search(shard, seed, 20) for seed in range(4)]
    found: dict[int, list[int]] = {}

    def ask(seed: int) -> None:
        for _ in range(20):
            found[seed] = search(shard, seed, 20)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    shard.add(stored(features(1500, 9), COUNT))  # extends the index meanwhile
    for thread in threads:
        thread.join()
    shard.wait()
    assert sorted(found) == [0, 1, 2, 3]
    assert all(len(set(found[seed]) & set(alone[seed])) >= 1 for seed in range(4))
    [made] = driver.made
    assert (made.resources.temporary, made.resources.pinned) == (256 << 20, 64 << 20)
    shard.close()


@pytest.mark.usefixtures("faked")
def test_where_faiss_has_no_memory_all_rows_are_multiplied(driver: type[Driver]) -> None:
    y = features()
    shard = Shard(CONFIG, "cuda", "GPU-Flat")
    shard.add(stored(y))
    shard.wait()

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("StandardGpuResources: alloc fail type TemporaryMemoryBuffer")

    [made] = driver.made
    made.search = failing  # type: ignore[method-assign]
    assert search(shard, 1, 20) == ranking(y, 1)[:20]
    shard.close()


@pytest.mark.usefixtures("driver")
def test_numbers_beyond_fp16_are_scaled_and_scores_are_not() -> None:
    y = 100 * features(2000)
    lifted = torch.cat([y.flatten(1), y.square().sum(1)], 1).numpy()
    assert lifted.max() > 65_504
    index = GpuIndex(WIDTH, "GPU-Flat", 2000, torch.device("cuda", 0), DIM)
    index.add(lifted[:1000])
    index.add(3 * lifted[1000:])
    queries = 1e4 * np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    scores, positions = index.search_batch(queries, 5, np.ones(2000, np.bool_))
    exact = queries.astype(np.float64) @ np.concatenate([lifted[:1000], 3 * lifted[1000:]]).T
    for q in range(3):
        assert set(np.argsort(-exact[q])[:3]) <= set(positions[q])
        largest = np.abs(exact[q]).max()
        assert np.abs(scores[q] - exact[q, positions[q]]).max() < 2e-3 * largest


def test_a_kind_that_cannot_be_built_here_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("StandardGpuResources", "GpuIndexFlatIP", "GpuIndexCagra"):  # of a FAISS for GPUs
        monkeypatch.delattr(faiss, name, raising=False)
    check_kind("HNSW", "cpu")
    with pytest.raises(IndexKindError, match="GPU-Flat needs a GPU, and this gallery is on the"):
        check_kind("GPU-Flat", "cpu")
    with pytest.raises(IndexKindError, match="is built without; install the extra gpu in place"):
        check_kind("GPU-IVF-SQ8", "cuda")
    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    with pytest.raises(IndexKindError, match="needs FAISS with cuVS, and faiss 1"):
        check_kind("GPU-CAGRA", "cuda:1")
    monkeypatch.setattr(faiss, "GpuIndexFlatIP", Driver, raising=False)
    found = obstacles("cuda")
    assert [kind for kind, why in found.items() if why is None] == ["GPU-Flat"]
    assert list(found) == list(GPU_KINDS)


def test_memory_of_every_kind_on_a_gpu_is_known() -> None:
    width = 1792
    per_item = {kind: index_bytes(kind, 1_000_000, width) / 1e6 for kind in GPU_KINDS}
    assert per_item["GPU-Flat"] == 2 * width
    assert per_item["GPU-CAGRA"] == 4 * width + 256
    assert width < per_item["GPU-IVF-SQ8"] < 1.01 * width + 20


def result(rows: int, index: str, ms: float, recall: float = 1.0, **other: Any) -> dict[str, Any]:
    return {
        "features": "sampled",
        "N": rows,
        "index": index,
        "setting": "10% of lists" if "IVF" in index else "",
        "C": 200,
        "modulation": "the checkpoint's γ, β",
        "recall@10": recall,
        "seconds per query": {"median": ms / 1e3, "least": 0, "most": 0},
        **other,
    }


def written(file: Path, results: list[dict[str, Any]], **facts: Any) -> Path:
    machine = {"gpu": "some GPU", **facts.get("machine", {})}
    settings = {"device": "cuda", **facts.get("settings", {})}
    report = {"benchmark": "recall", "settings": settings, "machine": machine, "results": results}
    file.write_text(json.dumps(report))
    return file


def test_on_a_gpu_the_kind_is_chosen_by_figures_measured_there(tmp_path: Path) -> None:
    figures = Figures.read(
        written(
            tmp_path / "recall.json",
            [
                result(100_000, "SQfp16", 0.3),
                result(100_000, "GPU-IVF-SQ8", 0.5),
                result(1_000_000, "SQfp16", 2.0),
                result(1_000_000, "SQfp16", 1.0, C=1000),
                result(1_000_000, "GPU-Flat", 2.5),
                result(1_000_000, "GPU-IVF-SQ8", 0.9, 0.995),
                result(1_000_000, "GPU-IVF-SQ8", 0.1, 0.995, setting="5% of lists"),
                result(1_000_000, "GPU-CAGRA", 0.2, 0.9),
                result(1_000_000, "GPU-CAGRA", 0.2, 1.0, modulation="γ × (1 ± 0.5)"),
            ],
        )
    )
    plenty = 1 << 50

    def chosen(count: int, free: int = plenty) -> IndexKind:
        return choose_kind(count, "cuda", lambda: free, WIDTH, figures)

    assert chosen(120_000) == "SQfp16"
    assert chosen(900_000) == chosen(3_000_000) == "GPU-IVF-SQ8"
    assert chosen(900_000, free=1_000_000) == "SQfp16"  # no memory for it
    assert chosen(20_000_000) == chosen(2000) == "SQfp16"  # nothing like them was measured
    # nothing was measured at all
    assert choose_kind(900_000, "cuda", lambda: plenty, WIDTH) == "SQfp16"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"settings": {"device": "cpu"}}, "were not measured on a GPU"),
        ({"machine": {"gpu": None}}, "were not measured on a GPU"),
        ({"settings": {"device": 3}}, "holds no figures of indexes"),
    ],
)
def test_other_figures_are_refused_with_the_remedy(
    facts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "recall.json", [], **facts)
    with pytest.raises(FiguresError, match=message) as refused:
        Figures.read(file)
    assert "cmt bench recall --device cuda --json" in str(refused.value)
    with pytest.raises(FiguresError, match="cannot be read"):
        Figures.read(tmp_path / "none.json")
