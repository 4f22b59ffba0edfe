"""Made-up features with the shape of real ones: people, several crops each, and queries of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model import Modulation

CROPS_PER_PERSON = 4
_LATENT = 48  # how many directions people differ in
_WITHIN = 0.6  # spread of one person's crops against that of people
_ACROSS = 1.0  # the same for queries, which come from the other modality
_BETA_SHARE = 0.3
_BLOCK = 65_536


class Data(NamedTuple):
    """gallery N×P×D in fp16, unit norm over P·D as `normalise_test` gives; queries Q×P×D."""

    gallery: Tensor
    queries: Tensor
    modulation: Modulation


def features(
    count: int, queries: int, parts: int, dim: int, *, gamma_deviation: float = 0.5, seed: int = 0
) -> Data:
    """N crops of N/4 people through a random map and ReLU; queries: further crops, less alike.

    γ = 1 + gamma_deviation·N(0, 1) and β = 0.3·|y|·N(0, 1) per query and channel.
    """
    generator = torch.Generator().manual_seed(seed)
    people = torch.randn(max(1, count // CROPS_PER_PERSON), _LATENT, generator=generator)
    mixing = torch.randn(_LATENT, parts * dim, generator=generator) / _LATENT**0.5

    def crops(of: Tensor, spread: float) -> Tensor:
        noise = spread * torch.randn(len(of), _LATENT, generator=generator)
        raw = functional.relu((people[of] + noise) @ mixing)
        return functional.normalize(raw, dim=1).view(-1, parts, dim)

    gallery = torch.empty(count, parts, dim, dtype=torch.float16)
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        gallery[start:end] = crops(
            torch.arange(start, end) // CROPS_PER_PERSON % len(people), _WITHIN
        )
    x = crops(torch.randint(len(people), (queries,), generator=generator), _ACROSS)
    gamma = 1 + gamma_deviation * torch.randn(queries, dim, generator=generator)
    size = float(gallery[:1000].float().abs().mean())
    beta = _BETA_SHARE * size * torch.randn(queries, dim, generator=generator)
    return Data(gallery, x, Modulation(gamma, beta))
