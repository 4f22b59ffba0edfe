"""Instance-level alignment (CMT §3.2): γ and β from the query, and the distances they define.

Axes: Q queries, N gallery items, P parts, D channels. With a query's complete representation x
and a gallery one y, the squared distance after modulation (13) is

    D²(x, y) = Σ_i ‖x_i − (γ⊙y_i + β)‖²
             = Σ_i ‖x_i − β‖²  −  2 Σ_i ⟨γ⊙(x_i − β), y_i⟩  +  ⟨γ⊙γ, s(y)⟩,   s(y) = Σ_i y_i⊙y_i

so that with z(y) = [y_1; …; y_P; s(y)] (`lift`, once per gallery item) and
w(x) = [2γ⊙(x_1−β); …; 2γ⊙(x_P−β); −γ⊙γ] (`project`, once per query), D² = c(x) − ⟨w(x), z(y)⟩:
ranking by the modulated distance is maximum inner product search. It is a generalised weighted
square Euclidean distance whose weights arrive with the query (Lei, Huang, Kankanhalli, Tung 2019,
"Sublinear Time Nearest Neighbor Search over Generalized Weighted Space").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import Metric

# part_distances works in blocks of at most this many numbers: a few hundred MB at most in fp32.
_BLOCK_NUMBERS = 1 << 25

FloatArray = npt.NDArray[np.floating[Any]]
_Array = TypeVar("_Array", Tensor, FloatArray)


class Modulation(NamedTuple):
    """Parameters of equation (12) for Q queries: gamma Q×D and beta Q×D."""

    gamma: Tensor
    beta: Tensor

    @classmethod
    def identity(
        cls,
        queries: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Modulation:
        """γ = 1, β = 0: the modulated distance becomes the plain Euclidean one."""
        return cls(
            torch.ones(queries, dim, device=device, dtype=dtype),
            torch.zeros(queries, dim, device=device, dtype=dtype),
        )


class Strength(NamedTuple):
    """How far γ and β are followed: γ' = c + s·(γ − c), β' = s·β.

    s: 1 as trained, 0 ranks unit vectors as without modulation. c: the mean of γ over channels and
    queries; alone it only scales, which changes no ranking of unit vectors. Generators are trained
    on the training people and overconfident on others, hence an s below 1, chosen on held-out ones.
    """

    s: float
    c: float

    def applied(self, modulation: Modulation) -> Modulation:
        """γ, β → γ', β', of the same shapes."""
        return Modulation(*self.of(*modulation))

    def of(self, gamma: _Array, beta: _Array) -> tuple[_Array, _Array]:
        """The same, of arrays of NumPy too."""
        return self.c + self.s * (gamma - self.c), self.s * beta


class ParameterGenerator(nn.Module):
    """g_γ or g_β of equation (12): Linear → ReLU → Linear, D → D, starting at a constant.

    The last layer starts with weight 0 and bias `start` (1 for γ, 0 for β), so that modulation
    starts as the identity. `input_scale` enlarges the first layer's initial weights where
    representations are normalised and their single numbers small.
    """

    def __init__(self, dim: int, hidden: int, start: float, input_scale: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, dim)
        with torch.no_grad():
            self.inner.weight.mul_(input_scale)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, start)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.outer(functional.relu(self.inner(pooled)))  # type: ignore[no-any-return]

    def in_numpy(self) -> Callable[[FloatArray], FloatArray]:
        """`forward` with the weights as they are now, Q×D → Q×D, and every row by itself."""
        layers = (self.inner.weight, self.inner.bias, self.outer.weight, self.outer.bias)
        inner, inner_bias, outer, outer_bias = (
            parameter.detach().float().cpu().numpy() for parameter in layers
        )

        def generated(pooled: FloatArray) -> FloatArray:
            hidden = np.maximum(np.vecdot(pooled[:, None], inner) + inner_bias, 0)
            made: FloatArray = np.vecdot(hidden[:, None], outer) + outer_bias
            return made

        return generated


def modulate(y: Tensor, modulation: Modulation) -> Tensor:
    """Equation (13) as written: y N×P×D under Q modulations → Q×N×P×D. The plain reference."""
    gamma, beta = modulation
    return y[None] * gamma[:, None, None] + beta[:, None, None]


def lift(y: Tensor, *, scale: float = 1.0) -> Tensor:
    """z(y): N×P×D → N×(P+1)D, the P·D numbers of y followed by s = Σ_i y_i⊙y_i.

    Computed in fp32 at least (fp16 features are widened first: s must be that of the *stored* y).
    `scale` multiplies the s block; give `project` the same scale. It brings s into fp16's range
    for a caller who stores z in fp16.
    """
    y = _widen(y)
    return torch.cat([y.flatten(1), squares(y) * scale], dim=1)


def squares(y: Tensor) -> Tensor:
    """s(y) = Σ_i y_i⊙y_i: N×P×D → N×D, in fp32 at least."""
    return _widen(y).square().sum(1)


def project(x: Tensor, modulation: Modulation, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """w(x) and c(x): x Q×P×D with its modulation → (Q×(P+1)D, Q), D² = c − ⟨w, z⟩."""
    x, gamma, beta = every = [_widen(one) for one in (x, *modulation)]
    if any(one.requires_grad or not one.is_cpu for one in every):
        return _projected(x, gamma, beta, scale, torch.hstack)
    w, c = project_arrays(*(one.numpy() for one in every), scale=scale)
    return torch.from_numpy(w), torch.from_numpy(c)


def project_arrays(
    x: FloatArray, gamma: FloatArray, beta: FloatArray, *, scale: float = 1.0
) -> tuple[FloatArray, FloatArray]:
    """The same in NumPy, whose steps begin several times as fast: most of a lone query's time."""
    return _projected(x, gamma, beta, scale, np.hstack)


def _projected(
    x: _Array,
    gamma: _Array,
    beta: _Array,
    scale: float,
    joined: Callable[[tuple[_Array, _Array]], _Array],
) -> tuple[_Array, _Array]:
    shifted = x - beta[:, None]  # Q×P×D
    flat = shifted.reshape(len(x), -1)
    w = joined(((2 * gamma[:, None] * shifted).reshape(len(x), -1), -gamma * gamma / scale))
    return w, (flat * flat).sum(1)


def squared_modulated_distance(x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
    """D²(x, y): Q×P×D, N×P×D → Q×N, as one matrix product; never negative.

    c − ⟨w, z⟩ cancels where the distance is small against ‖x‖: where the last digits count, use
    `part_distances` on the few items concerned.
    """
    w, c = project(x, modulation)
    return (c[:, None] - w @ lift(y).T).clamp(min=0)


def lifted_distances(w: Tensor, c: float, z: Tensor) -> npt.NDArray[np.float64]:
    """Distances of one query, as `project` gives it in float64, to z N×(P+1)D on the CPU: N.

    In the precision of z: good to its rounding of the largest distance. Every row is computed by
    itself, on the calling thread: what else is computed beside it changes no digit.
    """
    rows = z.numpy()
    squared = c - np.vecdot(rows, w.numpy().astype(rows.dtype)).astype(np.float64)
    distances: npt.NDArray[np.float64] = np.sqrt(np.maximum(squared, 0))
    return distances


def modulated_distance(x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
    """Euclidean distance between x (Q×P×D) and y (N×P×D) modulated by x's γ, β: Q×N."""
    return squared_modulated_distance(x, y, modulation).sqrt()


def part_distances(
    x: Tensor, y: Tensor, modulation: Modulation, *, block: int | None = None
) -> Tensor:
    """‖x_i − (γ⊙y_i + β)‖² for every part i: Q×P×D, N×P×D → Q×N×P.

    Their sum over P is the squared modulated distance, computed directly (nothing cancels), in
    blocks of `block` rows of the gallery: in the wider dtype of x and y, fp32 at least.
    """
    x = _widen(x.to(torch.promote_types(x.dtype, y.dtype)))
    gamma, beta = (parameter.to(x.dtype)[:, None, None] for parameter in modulation)
    offset = beta - x[:, None]  # Q×1×P×D
    block = block or max(1, _BLOCK_NUMBERS // max(1, x.numel()))
    found = x.new_empty(len(x), len(y), y.shape[1])
    # One memory for all blocks: a new one for each takes as long as what is computed there.
    widened = x.new_empty(min(block, len(y)), *y.shape[1:])
    apart = None if len(x) == 1 else x.new_empty(len(x), *widened.shape)
    for start in range(0, len(y), block):
        rows = y[start : start + block]
        here = widened[None, : len(rows)]
        there = here if apart is None else apart[:, : len(rows)]
        # Via fp32: converting fp16 to float64 directly takes three times as long.
        here[0].copy_(_widen(rows))
        torch.addcmul(offset, here, gamma, out=there)
        torch.sum(there.square_(), -1, out=found[:, start : start + block])
    return found


def modulated_cosine_distance(x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
    """1 − cos(x, γ⊙y + β) over all P·D numbers: Q×P×D, N×P×D → Q×N.

    Closed form: the numerator is ⟨γ⊙x, y⟩ + ⟨Σ_i x_i, β⟩, and
    ‖γ⊙y+β‖² = ⟨γ⊙γ, s⟩ + 2⟨γ⊙β, t⟩ + P‖β‖² with s = Σ_i y_i⊙y_i and t = Σ_i y_i.
    """
    x, y = _widen(x), _widen(y)
    gamma, beta = (_widen(parameter) for parameter in modulation)
    numerator = (gamma[:, None] * x).flatten(1) @ y.flatten(1).T
    numerator = numerator + (x.sum(1) * beta).sum(1, keepdim=True)
    norm = gamma.square() @ y.square().sum(1).T + 2 * (gamma * beta) @ y.sum(1).T
    norm = norm + x.shape[1] * beta.square().sum(1, keepdim=True)
    smallest = torch.finfo(norm.dtype).tiny
    denominator = norm.clamp(min=smallest).sqrt() * x.flatten(1).norm(dim=1, keepdim=True)
    cosine: Tensor = numerator / denominator.clamp(min=smallest)
    return 1 - cosine


def ranking_distance(x: Tensor, y: Tensor, modulation: Modulation, metric: Metric) -> Tensor:
    """Q×P×D against N×P×D under x's modulation → Q×N, in the metric that a checkpoint ranks by."""
    if metric == "cosine":
        return modulated_cosine_distance(x, y, modulation)
    return modulated_distance(x, y, modulation)


def _widen(tensor: Tensor) -> Tensor:
    """fp32 at least: sums of squares in half precision lose the differences that rank."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
