"""Products on a GPU: Triton's kernels by its interpreter, PyTorch's on a faked device."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from model import CMTConfig, Modulation, lift, part_distances, project
from service.gallery.feed import Stored
from service.gallery.index import features as features_of
from service.gallery.index import gpu_products
from service.gallery.index.chunks import CHUNK_ROWS, Mask
from service.gallery.index.features import Features
from service.gallery.index.gpu_products import halves, kernels_on
from service.gallery.index.inner_products import rounding_bound, scan
from service.gallery.index.shard import SearchRequest, Shard
from service.gallery.records import Filters
from tests.faked_device import FakedDevice
from tests.paths import ROOT

PARTS, DIM = 3, 16
CONFIG = CMTConfig(input_height=96, input_width=48, parts=PARTS, dim=DIM, heads=2)


def random(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, PARTS, DIM, generator=torch.Generator().manual_seed(seed))


def asked(count: int, scale: float = 1.0) -> tuple[Tensor, Modulation, Tensor]:
    """Queries in float64, and their w."""
    x = scale * random(count, 1).double()
    modulation = Modulation(1 + 0.5 * random(count, 2)[:, 0].double(), 0.3 * x[:, 0])
    return x, modulation, project(x, modulation)[0]


# Where kernels run: elsewhere than on a GPU, Triton's interpreter takes tensors of the CPU.
WHERE = "cuda" if torch.cuda.is_available() else "cpu"


def filled(blocks: Sequence[Tensor], device: str = WHERE) -> Features:
    features = Features(PARTS, DIM, "euclidean", device)
    for block in blocks:
        features.add(block.flatten(1).half().numpy())
    return features


@pytest.fixture
def kernels() -> ModuleType:
    """The kernels as Triton's interpreter runs them, or on a GPU as they are built for it."""
    pytest.importorskip("triton")
    return import_module("service.gallery.index.kernels")


@pytest.fixture
def chunk_rows(monkeypatch: pytest.MonkeyPatch) -> int:
    """Small chunks, whose ends are no ends of tiles."""
    for device in CHUNK_ROWS:
        monkeypatch.setitem(CHUNK_ROWS, device, 300)
    return 300


def by_kernel(
    kernels: ModuleType, features: Features, w: Tensor, count: int, masks: Sequence[Mask]
) -> tuple[Tensor, Tensor]:
    width = PARTS * DIM
    y, s = halves(w[:, :width].float()), halves(w[:, width:].float())
    queries = torch.cat([y[0], s[0]], 1).to(WHERE), torch.cat([y[1], s[1]], 1).to(WHERE)
    counts = [chunk.count for chunk in features.chunks]
    flags = [torch.from_numpy(mask).to(WHERE) for mask in masks]
    scores, positions = kernels.best(features.chunks, counts, queries, flags, count, (width, DIM))
    return scores.cpu(), positions.cpu()


@pytest.mark.gpu
@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize(("queries", "scale"), [(1, 1e-3), (5, 300.0), (33, 1.0)])
def test_the_kernel_scores_every_row_within_the_bound(
    kernels: ModuleType, queries: int, scale: float
) -> None:
    """Of chunks with different scales, the last of them hardly begun."""
    y = scale * torch.cat([random(250), 10 * random(301, 1), random(60, 2)])
    features = filled([y[:250], y[250:551], y[551:]])
    assert len({chunk.scale for chunk in features.chunks}) > 1
    _, _, w = asked(queries, scale)
    exact = (w @ lift(y.half().double()).T).numpy()
    everything = [np.ones(len(y), np.bool_)] * queries
    scores, positions = by_kernel(kernels, features, w, 2000, everything)
    for q in range(queries):
        real = torch.isfinite(scores[q])
        assert sorted(positions[q][real].tolist()) == list(range(len(y)))
        errors = np.abs(scores[q][real].numpy() - exact[q, positions[q][real].numpy()])
        assert errors.max() <= rounding_bound(features, w[q], exact=True)


def masks_of(count: int, queries: int) -> list[Mask]:
    """All, half of the rows, few, none, only the first; the others as the first."""
    generator = np.random.default_rng(0)
    some = [generator.random(count) < share for share in (1.1, 0.5, 0.01, -1)]
    masks = [*some, np.ones(310, np.bool_)]
    return masks[:queries] + [masks[0]] * (queries - len(masks))


@pytest.mark.gpu
@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize(("queries", "count"), [(5, 1), (32, 40), (5, 700)])
def test_the_kernel_finds_the_best_that_a_mask_allows(
    kernels: ModuleType, queries: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over several launches, where not all scores are held at once."""
    monkeypatch.setattr(kernels, "_SCORES", queries * 2 * 384)
    y = random(1000)
    features = filled([y])
    _, _, w = asked(queries)
    exact = (w @ lift(y.half().double()).T).numpy()
    masks = masks_of(len(y), queries)
    scores, positions = by_kernel(kernels, features, w, count, masks)
    for q, mask in enumerate(masks):
        real = torch.isfinite(scores[q]).numpy()
        mine = positions[q].numpy()[real]
        allowed = np.flatnonzero(mask)
        expected = allowed[np.argsort(-exact[q, allowed])][:count]
        assert len(mine) == len(set(mine)) == len(expected)
        assert set(mine) <= set(allowed)
        bound = rounding_bound(features, w[q], exact=True)
        assert (exact[q, mine] >= exact[q, expected] - 2 * bound).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("chunk_rows")
def test_of_equal_rows_as_many_are_found_as_are_wanted(kernels: ModuleType) -> None:
    y = random(4).repeat(250, 1, 1)
    features = filled([y])
    _, _, w = asked(1)
    scores, positions = by_kernel(kernels, features, w, 260, [np.ones(1000, np.bool_)])
    best = (w @ lift(y[:4].half().double()).T)[0].argsort(descending=True)
    found = positions[0].numpy() % 4
    assert len(set(positions[0].tolist())) == 260
    assert (found[:250] == int(best[0])).all()
    assert (found[250:] == int(best[1])).all()
    assert len(set(scores[0, :250].tolist())) == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("chunk_rows")
def test_rows_are_read_and_measured_wherever_they_are(kernels: ModuleType) -> None:
    y = random(1000)
    features = filled([y])
    x, modulation, _ = asked(3)
    places = np.random.default_rng(0).permutation(1000)[:200]
    whose = np.arange(200) % 3
    rows = torch.from_numpy(kernels.addresses(features.chunks, places, whose)).to(WHERE)
    assert torch.equal(kernels.gather(rows, PARTS * DIM).cpu(), y.half()[places].flatten(1))
    given = torch.cat([x, modulation.gamma[:, None], modulation.beta[:, None]], 1).to(WHERE)
    found = kernels.part_distances(rows, given, PARTS).cpu()
    expected = part_distances(x, y.half().double()[places], modulation)[whose, np.arange(200)]
    assert_allclose(found.numpy(), expected.numpy(), rtol=1e-12)
    assert kernels.part_distances(rows[:0], given, PARTS).shape == (0, PARTS)


BUILD = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from service.gallery.index import kernels

names = kernels._score.arg_names
kinds = ["*i64", "*fp16", "*fp32", "*i64", "*fp32", "*fp32", *["i32"] * 6, *["constexpr"] * 3]
by_16 = [*range(6), names.index("y_numbers"), names.index("s_numbers")]
source = ASTSource(
    fn=kernels._score,
    signature=dict(zip(names, kinds, strict=True)),
    constexprs={"ROWS": kernels.ROWS, "QUERIES": 32, "NUMBERS": kernels._NUMBERS},
    attrs={(place,): [["tt.divisibility", 16]] for place in by_16},
)
target = GPUTarget("cuda", int(sys.argv[1]), 32)
print(triton.compile(source, target=target, options=kernels.OPTIONS).asm["ptx"])
"""


@pytest.mark.parametrize(
    ("capability", "unit"), [(80, "mma.sync"), (90, "wgmma.mma"), (100, "tcgen05.mma")]
)
def test_the_kernel_of_scores_is_built_without_a_gpu(
    capability: int, unit: str, tmp_path: Path
) -> None:
    """For Ampere, Hopper and Blackwell: rows are read 16 bytes at once, fp16 is multiplied."""
    pytest.importorskip("triton")
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", BUILD, str(capability)]
    built = subprocess.run(
        command, env={**os.environ, **own}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "cp.async.cg" in built.stdout
    assert "ld.global.b16" not in built.stdout
    assert unit in built.stdout


def stored(y: Tensor, first: int = 0) -> Stored:
    numbers = range(first, first + len(y))
    return Stored(
        numbers=[number + 1 for number in numbers],
        persons=[f"p{number % 7}" for number in numbers],
        cameras=[f"c{number % 3}" for number in numbers],
        modalities=["rgb"] * len(y),
        captured=[None] * len(y),
        features=y.flatten(1).half().numpy(),
    )


class OnFaked:
    """A kernel of the interpreter that takes tensors of the faked device and is counted there."""

    def __init__(self, kernel: Any, device: FakedDevice) -> None:
        self._kernel, self._device = kernel, device

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self._device.count(self._kernel.fn.__name__, uploads=0, downloads=0)
            self._kernel[grid](*(getattr(one, "on_cpu", one) for one in args), **options)

        return launch


@pytest.fixture(params=["kernels", "torch"])
def on_faked(
    request: pytest.FixtureRequest, faked: FakedDevice, monkeypatch: pytest.MonkeyPatch
) -> FakedDevice:
    """The faked device, with each way to search it."""
    kernels: ModuleType | None = None
    if request.param == "kernels":
        kernels = request.getfixturevalue("kernels")
        for name in ("_score", "_distances", "_gather"):
            monkeypatch.setattr(kernels, name, OnFaked(getattr(kernels, name), faked))
    for module in (gpu_products, features_of):
        monkeypatch.setattr(module, "kernels_on", lambda _: kernels)
    return faked


def requests(count: int, *, exhaustive: bool, filters: Filters) -> list[SearchRequest]:
    x, modulation, _ = asked(count)
    return [
        SearchRequest(
            x[q], Modulation(*(p[q : q + 1] for p in modulation)), 20, 60, exhaustive, filters
        )
        for q in range(count)
    ]


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("exhaustive", [False, True])
def test_both_ways_answer_as_a_cpu_does(on_faked: FakedDevice, exhaustive: bool) -> None:
    assert on_faked.used == 0
    y = torch.cat([random(600), 2 * random(50, 5)])
    here, there = Shard(CONFIG, "cpu", "SQfp16"), Shard(CONFIG, "cuda", "SQfp16")
    for shard in (here, there):
        shard.add(stored(y))
        shard.mark_deleted([1, 5, 77])
    for filters in (Filters(), Filters(person_id=("p1", "p3")), Filters(person_id=("nobody",))):
        wanted = requests(2, exhaustive=exhaustive, filters=filters)
        pairs = zip(here.search(wanted), there.search(wanted), strict=True)
        for expected, found in pairs:
            assert found.numbers.tolist() == expected.numbers.tolist()
            assert_allclose(found.distances, expected.distances, rtol=1e-9)
    here.close()
    there.close()


def counted(faked: FakedDevice, queries: int, chunks: int) -> tuple[int, int]:
    """Launches and uploads of a search by a filter that was asked for before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHUNK_ROWS, "cuda", 1200 // chunks)
        shard = Shard(CONFIG, "cuda", "SQfp16")
        shard.add(stored(random(1200)))
    asked = requests(queries, exhaustive=False, filters=Filters(person_id=("p1", "p3")))
    shard.search(asked[:1])
    faked.reset()
    shard.search(asked)
    shard.close()
    return sum(faked.launches.values()), faked.uploads


def test_a_search_takes_no_launch_for_each_chunk_and_no_copy_of_a_known_filter(
    on_faked: FakedDevice, request: pytest.FixtureRequest
) -> None:
    """Before, it took about 28 launches and 3 copies for every chunk. PyTorch needs a product."""
    once = counted(on_faked, 1, 3)
    if "kernels" in request.node.name:
        assert once[0] <= 25
        assert once[1] <= 6
        assert counted(on_faked, 1, 12) == once
        assert counted(on_faked, 6, 3) == once
    else:
        more = counted(on_faked, 1, 12)
        assert more[0] <= once[0] + 3 * 9  # a product, and 2 to collect rows of the shortlist


def test_a_mask_is_copied_once_until_something_changes(on_faked: FakedDevice) -> None:
    gc.collect()
    shard = Shard(CONFIG, "cuda", "SQfp16")
    shard.add(stored(random(500)))
    x = requests(1, exhaustive=True, filters=Filters())
    before = set(gpu_products._masks)  # of other tests, whose shards are not collected yet
    shard.search(x)
    [key] = gpu_products._masks.keys() - before
    mask = gpu_products._masks[key]
    shard.search(x)
    assert gpu_products._masks.keys() - before == {key}
    assert gpu_products._masks[key] is mask
    [first] = shard.search(x)
    shard.mark_deleted([int(first.numbers[0])])
    [second] = shard.search(x)
    assert second.numbers.tolist()[:19] == first.numbers.tolist()[1:]
    del mask, first, second
    shard.close()
    del shard
    gc.collect()
    assert key not in gpu_products._masks
    assert on_faked.used == 0


WITHOUT_FAISS = """
import sys
sys.modules["faiss"] = None  # as if it were not installed
import numpy as np
from model import Modulation
from service.bench.engine import Engine
from tests.faked_device import faked_device
import torch

y = torch.randn(3000, 3, 16, generator=torch.Generator().manual_seed(0)).half()
with faked_device():
    engine = Engine(y, "cuda")
    plain = Modulation.identity(1, 16)
    [found] = engine.exhaustive(y[:1].float(), plain, 5)
    [index] = engine.indexes()
    assert found[0] == index.search(torch.cat([2 * y[0].flatten(), -torch.ones(16)]).double(), 5)[0]
print(index.kind, found[0])
Engine(y)
"""


def test_a_gallery_on_a_gpu_does_without_faiss() -> None:
    """As `make gpu-check` may have to; one on a CPU says what it lacks."""
    command = [sys.executable, "-c", WITHOUT_FAISS]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout == "SQfp16 0\n", ended.stderr
    assert ended.stderr.endswith("ModuleNotFoundError: No module named 'faiss'\n")


def test_kernels_that_cannot_be_built_are_told_once(
    faked: FakedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a host without a C compiler: PyTorch serves."""
    pytest.importorskip("triton")
    assert faked.free
    gpu_products._kernels.cache_clear()
    device = torch.device("cuda", 0)
    assert kernels_on(device) is None
    assert kernels_on(device) is None
    assert [line.message for line in caplog.records if "Triton builds no" in line.message]
    gpu_products._kernels.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_kernels_of_a_gpu_answer_as_a_cpu_does() -> None:
    pytest.importorskip("triton")
    y = random(70_000)
    assert kernels_on(torch.device("cuda", 0)) is not None
    features, there = filled([y], "cpu"), filled([y], "cuda")
    _, _, w = asked(33)
    masks: list[npt.NDArray[np.bool_]] = masks_of(len(y), 33)
    for mine, theirs in zip(scan(features, w, 300, masks), scan(there, w, 300, masks), strict=True):
        assert len(mine.positions) == len(theirs.positions)
        assert len(set(mine.positions) ^ set(theirs.positions)) <= 4
