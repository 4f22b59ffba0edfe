"""The first pass over bytes loses no row: its bounds hold, and every answer is the float64 one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from model import CMTConfig, Modulation, lift, project
from service.gallery.feed import Stored
from service.gallery.index import byte_codes, inner_products
from service.gallery.index.byte_codes import BLOCK, ByteCodes, code_bytes, levels
from service.gallery.index.chunks import Mask
from service.gallery.index.features import Features
from service.gallery.index.inner_products import Best
from service.gallery.index.shard import SearchRequest, Shard
from service.gallery.records import Filters
from tests.service.gallery.index.test_inner_products import order_of, reference

PARTS, DIM = 3, 16
WIDTH = (PARTS + 1) * DIM
CONFIG = CMTConfig(input_height=96, input_width=48, parts=PARTS, dim=DIM, heads=2)
COUNT = 9000  # more than one block

pytestmark = pytest.mark.skipif(levels(WIDTH) == 0, reason="no fast exact product of int8 here")


def noise(seed: int = 0) -> Tensor:
    return torch.randn(COUNT, PARTS, DIM, generator=torch.Generator().manual_seed(seed))


def unit(y: Tensor) -> Tensor:
    scaled: Tensor = y / y.flatten(1).norm(dim=1)[:, None, None]
    return scaled


def crowd() -> Tensor:
    """Unit vectors around a common mean, four alike for each person."""
    people = torch.randn(COUNT // 4 + 1, PARTS, DIM, generator=torch.Generator().manual_seed(5))
    return unit((1.5 + people.repeat_interleave(4, 0)[:COUNT] + 0.2 * noise()).relu())


def outliers() -> Tensor:
    y = unit(noise(1))
    y[::1000] *= 30_000  # near the end of fp16
    y[1::1000] *= 1e-6
    y[2::1000] = 0
    return y


def spikes() -> Tensor:
    """All that distinguishes rows is lost beside one large number."""
    y = 0.001 * noise(2)
    y[:, 0, 0] = 100
    return y


GALLERIES: dict[str, Callable[[], Tensor]] = {
    "crowd": crowd,
    "outliers": outliers,
    "spikes": spikes,
    "duplicates": lambda: unit(noise(3)[:30]).repeat(COUNT // 30, 1, 1),
    "all alike": lambda: torch.ones(COUNT, PARTS, DIM),
    "zeros": lambda: torch.zeros(COUNT, PARTS, DIM),
    "scattered": lambda: noise(4) * torch.logspace(-3, 3, COUNT)[:, None, None],
}


def stored(y: Tensor, first: int = 1) -> Stored:
    numbers = range(first, first + len(y))
    return Stored(
        numbers=list(numbers),
        persons=[f"p{i // 4}" for i in numbers],
        cameras=[f"c{i % 3}" for i in numbers],
        modalities=["ir" if i % 5 == 0 else "rgb" for i in numbers],
        captured=[None] * len(y),
        features=y.flatten(1).half().numpy(),
    )


def asked(y: Tensor, seed: int) -> tuple[Tensor, Modulation]:
    """A query near to a row, under γ and β of its own."""
    generator = torch.Generator().manual_seed(seed)
    gamma = 1.7 + 0.1 * torch.randn(1, DIM, generator=generator)
    beta = 0.05 * torch.randn(1, DIM, generator=generator)
    x = y[seed * 97] + 0.02 * torch.randn(PARTS, DIM, generator=generator)
    return x, Modulation(gamma, beta)


@pytest.fixture
def shards() -> Iterator[Callable[[Tensor], Shard]]:
    made = []

    def make(y: Tensor) -> Shard:
        shard = Shard(CONFIG, "cpu", kind="SQfp16")
        made.append(shard)
        shard.load([stored(y[:5000]), stored(y[5000:], 5001)])
        shard.wait()
        return shard

    yield make
    for shard in made:
        shard.close()


def coded(shard: Shard) -> int:
    codes = shard.freeze().segment.features.codes
    return 0 if codes is None else len(codes)


@pytest.mark.parametrize("largest", [127, 63])
@pytest.mark.parametrize("gallery", GALLERIES)
def test_every_score_lies_within_its_bounds(
    gallery: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_codes, "levels", lambda _: min(largest, levels(WIDTH)))
    y = GALLERIES[gallery]().half()
    z = lift(y)
    codes = ByteCodes(z[::3].numpy(), DIM)
    codes.add(z[:1000].numpy())
    codes.add(z[1000:].numpy())
    assert len(codes) == COUNT
    assert codes.bytes == code_bytes(2 * BLOCK, WIDTH)
    for seed in range(3):
        x, modulation = asked(y.float(), seed)
        w, _ = project(x[None].double(), Modulation(*(p.double() for p in modulation)))
        query = codes.coded(w[0], 0.0)
        true = ((z - codes.m).double() @ w[0] / query.alpha).numpy()
        rounding = 1e-7 * ((z - codes.m).abs().double() @ w[0].abs() / query.alpha).numpy()
        for rows in (slice(0, BLOCK), slice(BLOCK, COUNT)):
            bounds = codes.bounds(rows, query, torch.empty(rows.stop - rows.start))
            upper, error = (v.double().numpy() for v in bounds)
            assert (upper >= true[rows] - rounding[rows]).all()
            assert (upper - 2 * error <= true[rows] + rounding[rows]).all()


@pytest.mark.parametrize("gallery", GALLERIES)
def test_answers_with_codes_are_those_of_float64(
    gallery: str, shards: Callable[[Tensor], Shard]
) -> None:
    y = GALLERIES[gallery]()
    shard = shards(y)
    assert coded(shard) == COUNT
    requests = []
    for seed in range(6):
        x, modulation = asked(y, seed)
        requests.append(SearchRequest(x, modulation, 1 + 4 * seed, 30, exhaustive=True))
    # One alone, some together by a scan, and all together by a product.
    groups = [requests[:1], requests[1:4], requests]
    for group in groups:
        for request, scored in zip(group, shard.search(group), strict=True):
            expected = order_of(reference(request.x, y, request.modulation), request.count)
            assert scored.numbers.tolist() == expected


def test_the_first_pass_leaves_few_rows(shards: Callable[[Tensor], Shard]) -> None:
    y = crowd()
    features = shards(y).freeze().segment.features
    x, modulation = asked(y, 1)
    w, _ = project(x[None].double(), Modulation(*(p.double() for p in modulation)))
    mask = np.ones(COUNT, np.bool_)
    with_codes = inner_products.scan(features, w, 20, [mask])[0]
    ((best, *_), exact) = inner_products.exhaustive(features, w, 20, [mask], exact=True)
    assert exact
    assert best.complete
    assert 20 <= len(best.positions) < COUNT / 10
    features.codes = None
    without = inner_products.scan(features, w, 20, [mask])[0]
    assert with_codes.positions.tolist() == without.positions.tolist()
    np.testing.assert_allclose(with_codes.scores, without.scores, rtol=1e-4)


def test_filters_deletions_and_later_rows_are_seen(shards: Callable[[Tensor], Shard]) -> None:
    y = crowd()
    shard = shards(y)
    x, modulation = asked(y, 2)
    distances = reference(x, y, modulation)
    nearest = order_of(distances, 15)
    assert shard.mark_deleted(nearest[:5]) == sorted(nearest[:5])
    late = y[np.array(nearest[:3]) - 1]
    shard.add(stored(late, COUNT + 1))  # too few to be coded at once
    assert coded(shard) == COUNT

    def search(filters: Filters, count: int) -> list[int]:
        request = SearchRequest(x, modulation, count, count, exhaustive=True, filters=filters)
        return [int(n) for n in shard.search([request])[0].numbers]

    every = np.concatenate([distances, distances[np.array(nearest[:3]) - 1]])
    numbers = np.arange(1, COUNT + 4)
    alive = ~np.isin(numbers, nearest[:5])
    for filters, passing in (
        (Filters(), alive),
        (Filters(gallery_modality=("rgb",)), alive & (numbers % 5 != 0)),
        (Filters(gallery_modality=("ir",)), alive & (numbers % 5 == 0)),
        (Filters(exclude_camera_id=("c1",)), alive & (numbers % 3 != 1)),
    ):
        expected = numbers[passing][np.argsort(every[passing], kind="stable")]
        assert search(filters, 12) == expected[:12].tolist()
        assert search(filters, COUNT + 10) == expected.tolist()  # more than there are


def test_both_modalities_of_a_query_are_found_in_one_reading(
    shards: Callable[[Tensor], Shard],
) -> None:
    y = crowd()
    shard = shards(y)
    x, modulation = asked(y, 3)
    kinds = [Filters(gallery_modality=(kind,)) for kind in ("rgb", "ir")]
    requests = [SearchRequest(x, modulation, 10, 10, exhaustive=True, filters=f) for f in kinds]
    distances, numbers = reference(x, y, modulation), np.arange(1, COUNT + 1)
    for scored, passing in zip(
        shard.search(requests), (numbers % 5 != 0, numbers % 5 == 0), strict=True
    ):
        order = np.argsort(distances[passing], kind="stable")[:10]
        assert scored.numbers.tolist() == numbers[passing][order].tolist()


def test_rows_that_are_left_out_lose_their_codes(shards: Callable[[Tensor], Shard]) -> None:
    y = crowd()
    shard = shards(y)
    taken = list(range(1, COUNT, 3))
    shard.mark_deleted(taken)
    shard.wait()
    assert coded(shard) == COUNT - len(taken) == shard.statistics().items
    x, modulation = asked(y, 4)
    expected = [n for n in order_of(reference(x, y, modulation), 60) if n not in taken][:20]
    scored = shard.search([SearchRequest(x, modulation, 20, 20, exhaustive=True)])[0]
    assert scored.numbers.tolist() == expected


def test_codes_belong_to_the_memory_of_features(shards: Callable[[Tensor], Shard]) -> None:
    shard = shards(crowd())
    features = shard.freeze().segment.features
    assert isinstance(features, Features)
    rows = sum(chunk.capacity for chunk in features.chunks)
    assert features.codes is not None
    assert features.codes.bytes == code_bytes(2 * BLOCK, WIDTH)
    assert shard.statistics().feature_bytes == 2 * WIDTH * rows + features.codes.bytes


def listed(features: Features, x: Tensor, modulation: Modulation, mask: Mask) -> Best:
    w, _ = project(x[None].double(), Modulation(*(p.double() for p in modulation)))
    return inner_products.shortlist(features, w, 100, [mask])[0]


@pytest.mark.parametrize("gallery", GALLERIES)
def test_a_shortlist_by_codes_is_that_of_the_features(
    gallery: str, shards: Callable[[Tensor], Shard]
) -> None:
    y = GALLERIES[gallery]()
    shard = shards(y)
    features = shard.freeze().segment.features
    for seed in range(4):
        x, modulation = asked(y, seed)
        found = listed(features, x, modulation, np.ones(COUNT, np.bool_))
        # Codes do not choose among rows that are nearly alike to them, or to the query.
        assert found.coarse == (gallery in ("crowd", "duplicates"))
        scored = shard.search([SearchRequest(x, modulation, 100, 100)])[0]
        assert scored.candidates == 100
        assert scored.recall_ranks is not None
        assert sorted(scored.recall_ranks) == list(range(1, 101))
        if found.coarse:
            exact = shard.search([SearchRequest(x, modulation, 100, 100, exhaustive=True)])[0]
            assert scored.numbers.tolist() == exact.numbers.tolist()
            np.testing.assert_allclose(scored.distances, exact.distances, rtol=1e-12)


def test_a_shortlist_has_the_rows_that_codes_do_not_show(shards: Callable[[Tensor], Shard]) -> None:
    y = crowd()
    y[5001] = y[5001] * 50  # no row that the steps are made from
    shard = shards(y[:5000])
    shard.add(stored(y[5000:], 5001))
    shard.wait()
    shard.add(stored(y[[7, 5001]], COUNT + 1))  # too few to be coded at once
    features = shard.freeze().segment.features
    assert features.codes is not None
    assert 5001 in features.codes.apart
    x, (gamma, beta) = y[5001] / 0.8, Modulation(torch.ones(1, DIM), torch.zeros(1, DIM))
    found = listed(features, x, Modulation(gamma, beta), np.ones(COUNT + 2, np.bool_))
    assert found.coarse
    assert len(found.positions) == len(set(found.positions)) < 200
    every = shard.search([SearchRequest(x, Modulation(gamma, beta), 100, 100)])[0]
    assert every.numbers[:2].tolist() == [5002, COUNT + 2]
    only = Filters(exclude_camera_id=("c1",))  # of which row 5002 is
    some = shard.search([SearchRequest(x, Modulation(gamma, beta), 100, 100, filters=only)])[0]
    assert some.numbers[0] == COUNT + 2
    assert 5002 not in some.numbers
