"""What the benchmarks search: features, queries, and the γ, β that a checkpoint generates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from model import CMT, Modulation, load_checkpoint, modulation_of
from model.outputs import file_option
from service.bench.crops import BenchmarkDataError, CropFeatures
from service.bench.population import Population, persons_in_both

STATISTICS = Path("benchmarks/features.safetensors")
CHECKPOINT = Path("examples/compact.safetensors")

Statistics = Annotated[
    Path, typer.Option(help="Means and covariances of features, from cmt bench features.")
]
Checkpoint = Annotated[
    Path, typer.Option(help="The checkpoint of those features, whose generators give γ and β.")
]
Cache = Annotated[
    Path | None,
    typer.Option(help="Keep the features of the roots' crops here.", callback=file_option),
]


class Data(NamedTuple):
    """A gallery of visible crops and infrared queries of its persons.

    gallery: N×P×D fp16. persons: N numbers. queries: Q×P×D fp32, with their modulation (Q×D).
    wanted: the queries' persons.
    """

    gallery: Tensor
    persons: Tensor
    queries: Tensor
    wanted: Tensor
    modulation: Modulation


@dataclass(frozen=True)
class Source:
    """Sampled features: a population and the network of the checkpoint that embedded it."""

    population: Population
    network: CMT

    @classmethod
    def load(cls, statistics: Path, checkpoint: Path) -> Source:
        """Read both. Raises BenchmarkDataError where the statistics are not of this checkpoint."""
        population = Population.load(statistics)
        network, info = load_checkpoint(checkpoint)
        if info.fingerprint != population.fingerprint:
            raise BenchmarkDataError(
                f"{statistics} was measured on another checkpoint than {checkpoint}; measure this "
                "one with cmt bench features, and name the file with --statistics"
            )
        return cls(population, network)

    def sample(self, count: int, queries: int, *, seed: int = 0) -> Data:
        """N visible crops and Q infrared queries; γ, β from the checkpoint's generators."""
        sample = self.population.sample(count, queries, self.network, seed=seed)
        return Data(*sample, modulation_of(self.network, sample.queries))

    def sample_wide(self, count: int, queries: int, dim: int) -> Data:
        """The same with `dim` channels, a multiple of the checkpoint's D.

        For sizes without a checkpoint: dim/D independent draws side by side, each scaled so that
        the norm stays, and their γ and β side by side. Raises BenchmarkDataError.
        """
        copies, rest = divmod(dim, self.population.dim)
        if rest or copies < 1:
            raise BenchmarkDataError(
                f"{dim} channels cannot be made of draws of {self.population.dim}; give a multiple"
            )
        gallery = torch.empty(count, self.population.parts, dim, dtype=torch.float16)
        draws = []
        for seed, channels in enumerate(gallery.chunk(copies, dim=2)):
            drawn = self.sample(count, queries, seed=seed)
            channels.copy_(drawn.gallery / copies**0.5)
            draws.append(drawn._replace(gallery=channels))
        return Data(
            gallery,
            draws[0].persons,
            torch.cat([drawn.queries for drawn in draws], dim=2) / copies**0.5,
            draws[0].wanted,
            Modulation(
                torch.cat([drawn.modulation.gamma for drawn in draws], dim=1),
                torch.cat([drawn.modulation.beta for drawn in draws], dim=1) / copies**0.5,
            ),
        )


def unmodified(
    crops: CropFeatures, count: int, queries: int, network: CMT, *, each: int | None = None
) -> Data:
    """Real features as they are: up to `count` visible crops and `queries` infrared ones.

    Persons come in order, with all their visible crops or `each` of them; queries are drawn from
    the crops of those in the gallery.
    """
    generator = torch.Generator().manual_seed(0)
    visible, infrared = crops.only(infrared=False), crops.only(infrared=True)
    chosen = torch.isin(visible.persons, persons_in_both(crops)).nonzero().flatten()
    if each is not None:
        shuffled = chosen[torch.randperm(len(chosen), generator=generator)]
        persons = visible.persons[shuffled].tolist()
        chosen = shuffled[_first_of_each(persons, each)].sort().values
    chosen = chosen[:count]
    allowed = torch.isin(infrared.persons, visible.persons[chosen]).nonzero().flatten()
    drawn = allowed[torch.randperm(len(allowed), generator=generator)[:queries]]
    x = infrared.features[drawn].float()
    return Data(
        gallery=visible.features[chosen],
        persons=visible.persons[chosen],
        queries=x,
        wanted=infrared.persons[drawn],
        modulation=modulation_of(network, x),
    )


def _first_of_each(persons: Sequence[int], each: int) -> list[int]:
    seen: Counter[int] = Counter()
    places = []
    for place, person in enumerate(persons):
        seen[person] += 1
        if seen[person] <= each:
            places.append(place)
    return places


def stronger(modulation: Modulation, deviation: float) -> Modulation:
    """γ multiplied by 1 + deviation·N(0, 1), drawn for every query and channel."""
    gamma, beta = modulation
    generator = torch.Generator().manual_seed(0)
    return Modulation(gamma * (1 + deviation * torch.randn(gamma.shape, generator=generator)), beta)


def numbers(text: str) -> list[int]:
    """The whole numbers of a comma-separated option, which may be empty."""
    return [int(number) for number in text.split(",") if text]
