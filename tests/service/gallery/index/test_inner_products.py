"""Exhaustive search is the float64 ranking, whatever rounds on the way."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from model import CMTConfig, Modulation, lift, part_distances, project
from service.embedding.embedder import Embedder
from service.gallery.feed import Stored
from service.gallery.index import inner_products as nearest
from service.gallery.index.chunks import CHUNK_ROWS
from service.gallery.index.features import Features
from service.gallery.index.gpu_products import halves
from service.gallery.index.inner_products import multiply, rounding_bound, scan
from service.gallery.index.shard import SearchRequest, Shard
from service.images.decode import decode
from service.kit import precedence
from service.kit.precedence import Abandoned, turn, while_wanted
from tests.paths import ROOT

PARTS, DIM = 3, 16
CONFIG = CMTConfig(input_height=96, input_width=48, parts=PARTS, dim=DIM, heads=2)


def stored(y: Tensor, first: int = 1) -> Stored:
    """Items `first`, `first` + 1, … of N×P×D features."""
    count = len(y)
    return Stored(
        numbers=list(range(first, first + count)),
        persons=[f"p{i % 7}" for i in range(first, first + count)],
        cameras=[f"c{i % 3}" for i in range(first, first + count)],
        modalities=["rgb"] * count,
        captured=[None] * count,
        features=y.flatten(1).half().numpy(),
    )


def random(count: int, seed: int = 0, parts: int = PARTS, dim: int = DIM) -> Tensor:
    return torch.randn(count, parts, dim, generator=torch.Generator().manual_seed(seed))


def queries(count: int, seed: int = 1) -> tuple[Tensor, Modulation]:
    generator = torch.Generator().manual_seed(seed)
    gamma = 1 + 0.5 * torch.randn(count, DIM, generator=generator)
    return random(count, seed + 1), Modulation(gamma, 0.3 * random(count, seed, 1)[:, 0])


def reference(x: Tensor, y: Tensor, modulation: Modulation) -> npt.NDArray[np.float64]:
    """Squared distances in float64 to what is stored: N."""
    doubles = Modulation(*(p.double() for p in modulation))
    parts = part_distances(x[None].double(), y.half().double(), doubles)
    result: npt.NDArray[np.float64] = parts[0].sum(1).numpy()
    return result


def order_of(distances: npt.NDArray[np.float64], count: int) -> list[int]:
    order: list[int] = (np.argsort(distances, kind="stable")[:count] + 1).tolist()
    return order


def found(
    shard: Shard, x: Tensor, modulation: Modulation, count: int, *, exhaustive: bool = True
) -> list[int]:
    (scored,) = shard.search([SearchRequest(x, modulation, count, count, exhaustive)])
    numbers: list[int] = scored.numbers.tolist()
    return numbers


@pytest.fixture(params=["scan", "product"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of an exhaustive search, whatever the number of queries."""
    monkeypatch.setattr(nearest, "_SCAN_QUERIES", 1000 if request.param == "scan" else 0)


@pytest.mark.usefixtures("way")
def test_a_hundred_thousand_vectors_rank_as_in_float64() -> None:
    y = random(100_000)
    shard = Shard(CONFIG, "cpu", kind="SQfp16")
    shard.load([stored(y[:60_000]), stored(y[60_000:], 60_001)])
    x, modulation = queries(4)
    for q in range(4):
        one = Modulation(*(p[q : q + 1] for p in modulation))
        assert found(shard, x[q], one, 200) == order_of(reference(x[q], y, one), 200)
    shard.close()


def test_rendered_crops_rank_as_in_float64(tmp_path: Path) -> None:
    """Features of the demo checkpoint: unit norm, from a ReLU, close to each other."""
    files = sorted((ROOT / "tests/data/synth-sysu-mini").glob("cam*/*/*"))
    crops = [decode(file.read_bytes()) for file in files]
    embedder = Embedder(ROOT / "examples/compact.safetensors", device="cpu", runtime="torch")
    y = embedder.embed(crops)
    modulation = embedder.modulation(y)
    shard = Shard(embedder.info.config, "cpu")
    shard.add(stored(y))
    for q in range(0, len(y), 7):
        one = Modulation(*(p[q : q + 1] for p in modulation))
        expected = order_of(reference(y[q], y, one), len(y))
        assert found(shard, y[q], one, 20) == expected[:20]
        assert found(shard, y[q], one, len(y)) == expected
        assert found(shard, y[q], one, 20, exhaustive=False) == expected[:20]
    shard.close()
    embedder.close()


@pytest.mark.usefixtures("way")
def test_nearly_equal_features_need_more_candidates_than_slack() -> None:
    """The product loses all that distinguishes them; the proof fails and the search widens."""
    y = 50 + 0.02 * random(3000)
    shard = Shard(CONFIG, "cpu", kind="SQfp16")
    shard.add(stored(y))
    x = y[17] + 0.01
    plain = Modulation.identity(1, DIM)
    assert found(shard, x, plain, 50) == order_of(reference(x, y, plain), 50)
    assert shard.counters.widened > 0
    shard.close()


@pytest.mark.usefixtures("way")
def test_equal_distances_come_in_order_of_number() -> None:
    y = random(20, seed=4).repeat(200, 1, 1)
    shard = Shard(CONFIG, "cpu", kind="SQfp16")
    shard.add(stored(y))
    x, modulation = queries(1)
    assert found(shard, x[0], modulation, 250) == order_of(reference(x[0], y, modulation), 250)
    shard.close()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("explain", [False, True])
def test_a_search_of_all_rows_lets_short_ones_go_first(
    explain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first slice of the large gallery begins once the small one has been searched."""
    monkeypatch.setattr(precedence, "_PATIENCE", 60)
    y, (x, modulation) = random(30_000), queries(1)
    large, small = (Shard(CONFIG, "cpu", kind="SQfp16") for _ in range(2))
    large.load([stored(y)])
    small.add(stored(y[:50]))
    log: list[str] = []

    def wanted() -> bool:
        log.append("slice")
        return True

    def everything() -> list[int]:
        with while_wanted(wanted), turn(long=True):
            request = SearchRequest(x[0], modulation, 20, 20, exhaustive=True, explain=explain)
            numbers: list[int] = large.search([request])[0].numbers.tolist()
            return numbers

    with ThreadPoolExecutor() as threads:
        with turn(long=False):
            work = threads.submit(everything)
            nearest_of_small = found(small, x[0], modulation, 5, exhaustive=False)
            log.append("short")
        assert work.result(60) == order_of(reference(x[0], y, modulation), 20)
    assert nearest_of_small == order_of(reference(x[0], y[:50], modulation), 5)
    assert log[0] == "short"
    assert log.count("slice") >= 30_000 // CHUNK_ROWS["cpu"]
    large.close()
    small.close()


@pytest.mark.usefixtures("way")
def test_a_search_that_nobody_wants_any_more_ends_at_its_next_slice() -> None:
    y, (x, modulation) = random(40_000), queries(1)
    shard = Shard(CONFIG, "cpu", kind="SQfp16")
    shard.load([stored(y)])
    left = iter([True])
    with while_wanted(lambda: next(left, False)), turn(long=True), pytest.raises(Abandoned):
        found(shard, x[0], modulation, 20)
    assert found(shard, x[0], modulation, 20) == order_of(reference(x[0], y, modulation), 20)
    shard.close()


def test_threads_that_help_leave_its_core_to_the_one_that_searches() -> None:
    mine = os.sched_getaffinity(0)
    if min(len(mine), nearest._cores()) < 2:
        pytest.skip("needs two cores")
    both = threading.Barrier(2)

    def cores(_: int) -> set[int]:
        both.wait(60)  # so that either thread takes one of the two
        return os.sched_getaffinity(0)

    found = nearest._shared(cores, range(2))
    assert sorted(map(len, found)) == [len(mine) - 1, len(mine)]
    assert os.sched_getaffinity(0) == mine


def test_rows_as_near_as_the_last_one_hide_no_nearer_one_by_cosine() -> None:
    x = random(1, seed=1)
    near, other = x + 0.1 * random(5, seed=2), random(1, seed=3)
    y = torch.cat([other.repeat(9, 1, 1), near, other.repeat(200, 1, 1)])
    shard = Shard(CONFIG.model_copy(update={"metric": "cosine"}), "cpu", kind="SQfp16")
    shard.add(stored(y))
    numbers = found(shard, x[0], Modulation.identity(1, DIM), 10)
    assert sorted(numbers[:5]) == [10, 11, 12, 13, 14]
    assert numbers[5:] == [1, 2, 3, 4, 5]
    shard.close()


@pytest.mark.usefixtures("way")
def test_bf16_products_give_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    y = random(5000)
    shard = Shard(CONFIG, "cpu", kind="SQfp16")
    shard.add(stored(y))
    x, modulation = queries(1)
    exact = nearest.product_dtype
    monkeypatch.setattr(nearest, "product_dtype", lambda d, e: exact(d, e) if e else torch.bfloat16)
    assert found(shard, x[0], modulation, 60) == order_of(reference(x[0], y, modulation), 60)
    shard.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_no_score_is_further_off_than_the_bound(
    dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "product_dtype", lambda device, exact: dtype)
    y = scale * random(3000)
    features = Features(PARTS, DIM, "euclidean", "cpu")
    for start in range(0, 3000, 700):
        features.add(y[start : start + 700].flatten(1).half().numpy())
    x, modulation = queries(5)
    doubles = Modulation(*(p.double() for p in modulation))
    w, _ = project(scale * x.double(), doubles)
    exact = (w @ lift(y.half().double()).T).numpy()
    everything = [np.ones(3000, np.bool_)] * 5
    ways = [multiply] if dtype == torch.bfloat16 else [scan, multiply]
    for search in ways:
        for q, best in enumerate(search(features, w, 3000, everything)):
            bound = rounding_bound(features, w[q], exact=False)
            errors = np.abs(best.scores - exact[q, best.positions])
            assert len(errors) == 3000
            assert 0 < errors.max() <= bound


@pytest.mark.parametrize("search", [scan, multiply])
def test_every_query_has_its_own_mask(search: object) -> None:
    y = random(9000)
    features = Features(PARTS, DIM, "euclidean", "cpu")
    features.add(y.flatten(1).half().numpy())
    x, modulation = queries(6)
    w, _ = project(x.double(), Modulation(*(p.double() for p in modulation)))
    generator = np.random.default_rng(0)
    # The last sees only the first rows, as a search that began before the others were added.
    masks = [generator.random(9000) < share for share in (1, 0.5, 0.5, 0.001, 0)]
    masks.append(np.ones(100, np.bool_))
    exact = (w @ lift(y.half().double()).T).numpy()
    results = search(features, w, 40, masks)  # type: ignore[operator]
    for q, (best, mask) in enumerate(zip(results, masks, strict=True)):
        allowed = np.flatnonzero(mask)
        expected = allowed[np.argsort(-exact[q, allowed])][:40]
        assert set(best.positions) <= set(allowed)
        assert len(best.positions) == len(expected)
        bound = rounding_bound(features, w[q], exact=search is scan)
        assert (exact[q, best.positions] >= exact[q, expected] - 2 * bound).all()


def test_growing_features_keep_every_row_and_one_chunk_more() -> None:
    """In blocks that end anywhere; s of very different size gets a chunk of another scale."""
    sizes = [1, 5000, 3192, 8192, 10_000, 7]
    features = Features(PARTS, DIM, "euclidean", "cpu")
    blocks = []
    for seed, size in enumerate(sizes):
        blocks.append((random(size, seed) * (1 if seed < 5 else 1000)).flatten(1).half().numpy())
        features.add(blocks[-1])
    rows = np.concatenate(blocks)
    lifted = lift(torch.from_numpy(rows).double().view(-1, PARTS, DIM))
    y_norm, s_norm = (
        float(part.norm(dim=1).max()) for part in torch.split(lifted, PARTS * DIM, dim=1)
    )
    assert y_norm <= features.norms.y <= 1.01 * y_norm
    assert s_norm <= features.norms.s <= 1.01 * s_norm
    assert len(features) == len(rows) == sum(sizes)
    shuffled = np.random.default_rng(0).permutation(len(rows))
    here = np.sort(shuffled[:5000])
    assert np.array_equal(features.stored(here), rows[here])
    query, plain = random(1, 9)[0], Modulation.identity(1, DIM)
    distances, parts = features.rescore(query, plain, shuffled)
    apart = torch.from_numpy(rows[shuffled]).double() - query.double().flatten()
    assert parts is not None
    assert_allclose(distances, apart.norm(dim=1).numpy(), rtol=1e-12)
    assert_allclose(parts.sum(1), distances**2, rtol=1e-5)
    assert len({chunk.scale for chunk in features.chunks}) > 1
    per_chunk = CHUNK_ROWS["cpu"] * (PARTS + 1) * DIM * 2
    assert features.bytes == len(features.chunks) * per_chunk
    assert len(features.chunks) == -(-(sum(sizes) - 7) // CHUNK_ROWS["cpu"]) + 1
    large = Modulation.identity(1, DIM, dtype=torch.float64)
    w, _ = project(torch.from_numpy(rows[-3:]).view(3, PARTS, DIM)[:1].double(), large)
    [best] = scan(features, w, 7, [np.ones(len(rows), np.bool_)])
    assert best.positions[0] == len(rows) - 3


def test_two_halves_are_nearly_fp32() -> None:
    w = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-6], [1.0], [1e6]]
    )
    both, size = halves(w)
    high, low = both.float().chunk(2)
    error = (size * (high + low / 2**11) - w).abs()
    assert bool((error <= 2.0**-22 * w.abs() + 2.0**-35 * size).all())
