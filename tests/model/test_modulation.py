"""The lifted form against equation (13) as written, in plain float64 loops."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from model import (
    Modulation,
    Strength,
    lift,
    modulate,
    modulated_cosine_distance,
    modulated_distance,
    part_distances,
    project,
)
from model.modulation import lifted_distances


def draw(
    q: int, n: int, p: int, d: int, seed: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, Modulation]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y = scale * normal(q, p, d), scale * normal(n, p, d)
    return x, y, Modulation(1 + 0.5 * normal(q, d), 0.3 * scale * normal(q, d))


def plain_parts(
    x: torch.Tensor, y: torch.Tensor, modulation: Modulation
) -> list[list[list[float]]]:
    """‖x_i − (γ⊙y_i + β)‖² for every query, item and part, number by number."""
    return [
        [
            [
                sum(
                    (
                        x[q, i, k].item()
                        - (
                            modulation.gamma[q, k].item() * y[n, i, k].item()
                            + modulation.beta[q, k].item()
                        )
                    )
                    ** 2
                    for k in range(x.shape[2])
                )
                for i in range(x.shape[1])
            ]
            for n in range(len(y))
        ]
        for q in range(len(x))
    ]


@settings(max_examples=25, deadline=None)
@given(
    q=st.integers(1, 3),
    n=st.integers(1, 4),
    p=st.integers(1, 4),
    d=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_every_distance_equals_the_plain_loops(
    q: int, n: int, p: int, d: int, seed: int, scale: float
) -> None:
    x, y, modulation = draw(q, n, p, d, seed, scale)
    parts = torch.tensor(plain_parts(x, y, modulation), dtype=torch.float64)
    torch.testing.assert_close(part_distances(x, y, modulation), parts, rtol=1e-12, atol=1e-14)
    expected = parts.sum(2).sqrt()
    torch.testing.assert_close(modulated_distance(x, y, modulation), expected, rtol=1e-6, atol=0)
    w, c = project(x, modulation)
    squared = c[:, None] - w @ lift(y).T
    torch.testing.assert_close(squared, parts.sum(2), rtol=1e-6, atol=1e-9 * scale**2)


def test_modulate_is_equation_13_number_by_number() -> None:
    _, y, modulation = draw(2, 3, 2, 4, seed=1)
    result = modulate(y, modulation)
    assert result.shape == (2, 3, 2, 4)
    for q in range(2):
        for n in range(3):
            for i in range(2):
                for k in range(4):
                    gamma, beta = modulation.gamma[q, k].item(), modulation.beta[q, k].item()
                    assert result[q, n, i, k].item() == pytest.approx(
                        y[n, i, k].item() * gamma + beta, rel=1e-15
                    )


def test_shapes_of_lift_and_project() -> None:
    x, y, modulation = draw(2, 5, 3, 4, seed=2)
    w, c = project(x, modulation)
    assert lift(y).shape == (5, 16)
    assert w.shape == (2, 16)
    assert c.shape == (2,)
    torch.testing.assert_close(lift(y)[:, 12:], y.square().sum(1))


def test_project_in_numpy_is_project_with_gradients() -> None:
    x, _, modulation = draw(3, 1, 2, 5, seed=7)
    given = [one.clone().requires_grad_() for one in (x, *modulation)]
    expected = project(given[0], Modulation(*given[1:]), scale=0.5)
    torch.testing.assert_close(project(x, modulation, scale=0.5), expected)
    torch.autograd.backward([part.sum() for part in expected])
    assert all(one.grad is not None and one.grad.abs().max() > 0 for one in given)


@pytest.mark.parametrize("scale", [2.0**-8, 1.0, 64.0])
def test_the_scale_of_the_lifted_block_cancels(scale: float) -> None:
    x, y, modulation = draw(3, 7, 2, 5, seed=3)
    w, c = project(x, modulation, scale=scale)
    squared = c[:, None] - w @ lift(y, scale=scale).T
    torch.testing.assert_close(squared, part_distances(x, y, modulation).sum(2))


def test_an_image_against_itself_costs_what_13_implies() -> None:
    x, _, modulation = draw(4, 1, 3, 6, seed=4)
    own = modulated_distance(x, x, modulation).diagonal().square()
    gamma, beta = modulation.gamma[:, None], modulation.beta[:, None]
    expected = (x - gamma * x - beta).square().sum((1, 2))
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)
    assert (expected > 1e-3).all()  # and it is not zero


def test_identity_modulation_is_the_plain_distance() -> None:
    x, y, _ = draw(3, 6, 2, 4, seed=5)
    identity = Modulation.identity(3, 4, dtype=torch.float64)
    expected = torch.cdist(x.flatten(1), y.flatten(1))
    torch.testing.assert_close(modulated_distance(x, y, identity), expected)


def test_strength_draws_gamma_and_beta_towards_no_modulation() -> None:
    x, y, modulation = draw(3, 6, 2, 8, seed=5)
    x, y = (functional.normalize(rows.flatten(1), dim=1).view_as(rows) for rows in (x, y))
    c = float(modulation.gamma.mean())
    half = Strength(0.5, c).applied(modulation)
    for q, d in product(range(len(x)), range(x.shape[2])):
        gamma, beta = float(modulation.gamma[q, d]), float(modulation.beta[q, d])
        assert float(half.gamma[q, d]) == pytest.approx((gamma + c) / 2)
        assert float(half.beta[q, d]) == pytest.approx(beta / 2)
    whole = Strength(1, c).applied(modulation)
    torch.testing.assert_close(whole, modulation)
    none = modulated_distance(x, y, Strength(0, c).applied(modulation))
    plain = modulated_distance(x, y, Modulation.identity(*modulation.gamma.shape))
    assert torch.equal(none.argsort(dim=1), plain.argsort(dim=1))


def test_fp16_storage_keeps_the_order_of_the_returned_results() -> None:
    # Stored in fp16, shortlisted through the lifted product, the top recomputed directly in fp32:
    # the answer must be ordered as float64 orders the same stored features.
    generator = torch.Generator().manual_seed(6)
    n, p, d = 5000, 6, 32
    y = torch.nn.functional.normalize(torch.randn(n, p * d, generator=generator), dim=1)
    stored = y.view(n, p, d).half()
    x = stored[:20].float() + 0.02 * torch.randn(20, p, d, generator=generator)
    modulation = Modulation(
        1 + 0.4 * torch.randn(20, d, generator=generator),
        0.01 * torch.randn(20, d, generator=generator),
    )
    w, _ = project(x, modulation)
    shortlist = (w @ lift(stored).T).topk(100, dim=1).indices
    exact = modulated_distance(
        x.double(), stored.double(), Modulation(*(m.double() for m in modulation))
    )
    for query in range(20):
        rows = shortlist[query]
        one = Modulation(modulation.gamma[query : query + 1], modulation.beta[query : query + 1])
        direct = part_distances(x[query : query + 1], stored[rows], one).sum(2)[0]
        top = rows[direct.argsort()[:20]]
        assert top.tolist() == exact[query].argsort()[:20].tolist()


def test_part_distances_in_blocks_equal_one_block() -> None:
    x, y, modulation = draw(3, 50, 2, 4, seed=8)
    whole = part_distances(x, y, modulation)
    assert torch.equal(part_distances(x, y, modulation, block=7), whole)


def test_cosine_distance_equals_modulate_then_measure() -> None:
    x, y, modulation = draw(3, 6, 4, 5, seed=9)
    result = modulated_cosine_distance(x, y, modulation)
    changed = modulate(y, modulation)
    for q in range(3):
        for n in range(6):
            a, b = x[q].flatten().tolist(), changed[q, n].flatten().tolist()
            dot = sum(s * t for s, t in zip(a, b, strict=True))
            norms = math.hypot(*a) * math.hypot(*b)
            assert result[q, n].item() == pytest.approx(1 - dot / norms, rel=1e-9)


@pytest.mark.gpu
def test_a_gpu_measures_the_same_distances(device: str) -> None:
    x, y, modulation = draw(3, 500, 6, 32, seed=5)
    there = Modulation(*(one.to(device) for one in modulation))
    for measured in (modulated_distance, part_distances):
        expected = measured(x, y, modulation)
        found = measured(x.to(device), y.to(device), there)
        torch.testing.assert_close(found.cpu(), expected)


def test_distances_to_lifted_rows_are_the_direct_ones_and_do_not_depend_on_other_rows() -> None:
    generator = torch.Generator().manual_seed(8)
    x, y = (torch.randn(n, 3, 17, generator=generator, dtype=torch.float64) for n in (1, 50))
    modulation = Modulation(*(torch.rand(1, 17, generator=generator).double() for _ in range(2)))
    w, c = project(x, modulation)
    z = lift(y)
    found = lifted_distances(w[0], float(c[0]), z)
    direct = part_distances(x, y, modulation).sum(2).sqrt()[0]
    torch.testing.assert_close(torch.from_numpy(found), direct)
    for rows in (slice(7, 8), slice(3, 40)):
        assert (lifted_distances(w[0], float(c[0]), z[rows]) == found[rows]).all()
    assert lifted_distances(w[0], float(c[0]), z[:0]).shape == (0,)
