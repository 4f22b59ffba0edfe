"""A population of features: measured once on real crops, then sampled in any size.

The model is the usual random-effects one, for both modalities together. Crop j of person k in
modality m (visible, infrared) has the features, P·D numbers,

    y_kmj = μ_m + b_km + e_kmj,   Cov(b_k,visible; b_k,infrared) = B,   e_kmj ~ N(0, W_m).

W_m is the covariance within persons, pooled over them. B, of 2·P·D numbers, is the covariance
between persons: that of the persons' mean features, minus what the noise of n crops adds to them
(W_m / n). It is joint, so that a sampled person's infrared crops are as near to their visible ones
as real ones are. Each covariance is kept as its leading directions F and the variance r of every
single number that they do not explain: FFᵀ + diag(r), positive semidefinite whatever the estimate
was, small in a file, and sampled with as many numbers per row as it has directions and features.

A new person's coordinates in B's directions are cos θ·u + sin θ·v, where u and v are those of two
of the measured persons, whitened, and θ is uniform from 0 to 30°. Their covariance is B again, but
their distribution stays nearer to the real one: with normal coordinates people are far too easy to
tell apart, and γ, β too different. `cmt bench features` measures how much of that is left.
Samples are scaled to unit norm where the checkpoint does that, and rounded to fp16, as the service
stores them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import CMT
from service.bench.crops import BenchmarkDataError, CropFeatures

CROPS_PER_PERSON = 4
_PERSONS = 8192  # sampled in one block
_WIDEST_ANGLE = math.radians(30)  # between a sampled person and the measured one behind it
_FORMAT = "cmt-population-1"


class Covariance(NamedTuple):
    """A covariance FFᵀ + diag(rest) over S numbers: factor F S×K, rest S."""

    factor: Tensor
    rest: Tensor

    @classmethod
    def nearest(cls, matrix: Tensor, rank: int) -> Covariance:
        """Keep the `rank` leading directions of S×S `matrix`, and the variances beyond them."""
        values, vectors = torch.linalg.eigh(matrix)
        factor = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
        rest = matrix.diagonal() - factor.square().sum(1)
        return cls(factor.float(), rest.clamp(min=0).float())

    def of(self, coordinates: Tensor, generator: torch.Generator) -> Tensor:
        """Whitened coordinates N×K → N×S draws of mean 0 and this covariance."""
        drawn = torch.randn(len(coordinates), len(self.rest), generator=generator)
        return drawn.mul_(self.rest.sqrt()).addmm_(coordinates, self.factor.T)

    def normal(self, count: int, generator: torch.Generator) -> Tensor:
        """count×S normal draws."""
        return self.of(torch.randn(count, self.factor.shape[1], generator=generator), generator)


class Sample(NamedTuple):
    """A gallery of visible crops and infrared queries of its persons.

    gallery: N×P×D fp16. persons: N numbers. queries: Q×P×D fp32. wanted: the queries' persons.
    """

    gallery: Tensor
    persons: Tensor
    queries: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Population:
    """Means and covariances measured on crops. Pairs are (visible, infrared).

    fingerprint: of the checkpoint that embedded them. crops: how many. people: the measured
    persons' coordinates in the directions of `between`, K×R, of mean 0 and covariance 1.
    """

    fingerprint: str
    parts: int
    dim: int
    crops: int
    people: Tensor
    mean: tuple[Tensor, Tensor]
    between: Covariance
    within: tuple[Covariance, Covariance]

    @classmethod
    def measure(cls, crops: CropFeatures, fingerprint: str, rank: int) -> Population:
        """Estimate means and covariances; persons without crops of both modalities are left out.

        Raises BenchmarkDataError where fewer than two persons are left.
        """
        both = persons_in_both(crops)
        if len(both) < 2:
            raise BenchmarkDataError(
                "covariances need two persons with visible and infrared crops; give more folders"
            )
        visible, infrared = (_moments(crops.only(kind), both) for kind in (False, True))
        deviations = torch.cat([visible.deviations, infrared.deviations], 1)
        matrix = deviations.T @ deviations / (len(both) - 1)
        size = len(visible.within)
        matrix[:size, :size] -= visible.noise
        matrix[size:, size:] -= infrared.noise
        between = Covariance.nearest(matrix, min(rank, len(both) - 1))
        _, parts, dim = crops.features.shape
        return cls(
            fingerprint=fingerprint,
            parts=parts,
            dim=dim,
            crops=int(torch.isin(crops.persons, both).sum()),
            people=_white(deviations @ between.factor.double()),
            mean=(visible.mean.float(), infrared.mean.float()),
            between=between,
            within=(
                Covariance.nearest(visible.within, rank),
                Covariance.nearest(infrared.within, rank),
            ),
        )

    def sample(self, count: int, queries: int, network: CMT, *, seed: int = 0) -> Sample:
        """Draw `count` visible crops, four per person, and infrared crops of `queries` persons.

        Whose crops the queries are does not depend on the seed.
        """
        people = -(-count // CROPS_PER_PERSON)
        generator = torch.Generator().manual_seed(0)
        wanted = torch.randint(people, (queries,), generator=generator).sort().values
        generator.manual_seed(seed)
        gallery = torch.empty(count, self.parts, self.dim, dtype=torch.float16)
        found = []
        for start, visible, infrared in self._people(people, generator):
            rows = visible.repeat_interleave(CROPS_PER_PERSON, 0)
            rows += self.within[0].normal(len(rows), generator)
            first = start * CROPS_PER_PERSON
            rows = rows[: count - first]
            gallery[first : first + len(rows)] = self._ranked(rows, network)
            here = wanted[(wanted >= start) & (wanted < start + len(visible))] - start
            crops = infrared[here] + self.within[1].normal(len(here), generator)
            found.append(self._ranked(crops, network))
        persons = torch.arange(count) // CROPS_PER_PERSON
        return Sample(gallery, persons, torch.cat(found), wanted)

    def _people(
        self, count: int, generator: torch.Generator
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Blocks of B persons: the first one's number, mean features per modality, B×(P·D)."""
        for start in range(0, count, _PERSONS):
            block = min(_PERSONS, count - start)
            first, second = torch.randint(len(self.people), (2, block), generator=generator)
            angle = torch.rand(block, 1, generator=generator) * _WIDEST_ANGLE
            mixed = angle.cos() * self.people[first] + angle.sin() * self.people[second]
            visible, infrared = self.between.of(mixed, generator).chunk(2, dim=1)
            yield start, visible + self.mean[0], infrared + self.mean[1]

    def _ranked(self, rows: Tensor, network: CMT) -> Tensor:
        return network.ranked_form(rows.view(-1, self.parts, self.dim))

    def save(self, path: Path) -> None:
        """Write a .safetensors file; factors in fp16, so that it stays small."""
        tensors = {
            "mean": torch.stack(self.mean),
            "people": self.people.half(),
            "between.factor": self.between.factor.half(),
            "between.rest": self.between.rest,
        }
        for name, covariance in zip(("visible", "infrared"), self.within, strict=True):
            tensors[f"within.{name}.factor"] = covariance.factor.half()
            tensors[f"within.{name}.rest"] = covariance.rest
        facts = {name: str(getattr(self, name)) for name in _FACTS}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path,
            {"format": _FORMAT, **facts},
        )

    @classmethod
    def load(cls, path: Path) -> Population:
        """Read what `save` wrote. Raises BenchmarkDataError."""
        if not path.is_file():
            raise BenchmarkDataError(
                f"no statistics of features at {path}; run this in the repository, or measure "
                "some with cmt bench features"
            )
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise BenchmarkDataError(f"{path} is damaged ({error}); fetch it again") from error
        if facts.get("format") != _FORMAT:
            raise BenchmarkDataError(
                f"{path} holds no statistics of this release; measure them with cmt bench features"
            )

        def covariance(name: str) -> Covariance:
            return Covariance(tensors[f"{name}.factor"], tensors[f"{name}.rest"])

        return cls(
            fingerprint=facts["fingerprint"],
            **{name: int(facts[name]) for name in _FACTS[1:]},
            people=tensors["people"],
            mean=(tensors["mean"][0], tensors["mean"][1]),
            between=covariance("between"),
            within=(covariance("within.visible"), covariance("within.infrared")),
        )


_FACTS = ("fingerprint", "parts", "dim", "crops")


def persons_in_both(crops: CropFeatures) -> Tensor:
    """The persons with crops of both modalities, sorted."""
    visible, infrared = (set(crops.only(kind).persons.tolist()) for kind in (False, True))
    return torch.tensor(sorted(visible & infrared), dtype=torch.long)


class _Moments(NamedTuple):
    """One modality of K persons: mean S, the persons' deviations from it K×S, W_m and W_m / n."""

    mean: Tensor
    deviations: Tensor
    within: Tensor
    noise: Tensor


def _moments(crops: CropFeatures, chosen: Tensor) -> _Moments:
    """Estimates from the crops of the `chosen` persons (sorted numbers), in float64."""
    places = torch.isin(crops.persons, chosen)
    persons = torch.searchsorted(chosen, crops.persons[places])
    y = crops.features[places].flatten(1).double()
    counts = torch.bincount(persons, minlength=len(chosen)).double()
    means = torch.zeros(len(chosen), y.shape[1], dtype=torch.double).index_add_(0, persons, y)
    means /= counts[:, None]
    y -= means[persons]
    within = y.T @ y / max(1, len(y) - len(chosen))
    mean = means.mean(0)
    return _Moments(mean, means - mean, within, within * counts.reciprocal().mean())


def _white(coordinates: Tensor) -> Tensor:
    """The nearest K×R coordinates of covariance 1: all directions have equal variance."""
    u, _, vt = torch.linalg.svd(coordinates, full_matrices=False)
    white: Tensor = u @ vt * (len(coordinates) - 1) ** 0.5
    return white.float()
