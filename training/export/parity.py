"""Whether an exported network computes what PyTorch computes, on real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model import CMT, Modality, Modulation
from model.graphs import MODULATION
from model.modalities import MODALITIES, embedding_name
from training.export.formats import GraphRunner

# The runtimes add the same fp32 numbers in another order: a millionth of the largest entry for the
# demo checkpoint. bf16, a wrong operator or one wrong weight tensor change thousandths and more.
MOST_ERROR = 1e-4  # of an output's largest entry
LEAST_COSINE = 0.99999  # of one image's output with PyTorch's
# Two gallery images may swap places only where PyTorch's own distances to them differ by less.
MOST_SWAPPED = 1e-4  # of the distance
BATCHES = (1, 3, 8)  # each a new size for a graph that was made with 2
TOP = 10


@dataclass(frozen=True)
class OutputParity:
    """One output of a graph at one batch size, over all images.

    max_error: largest absolute difference.
    relative_error: the same as a share of the largest absolute entry.
    min_cosine: lowest cosine of one image's output with PyTorch's.
    """

    graph: str
    output: str
    batch: int
    max_error: float
    relative_error: float
    min_cosine: float

    @property
    def passed(self) -> bool:
        """Whether the output is PyTorch's but for rounding."""
        # Written so that NaN does not pass.
        return self.relative_error <= MOST_ERROR and self.min_cosine >= LEAST_COSINE


@dataclass(frozen=True)
class RankingParity:
    """Infrared queries in a visible gallery, modulated, everything but the distance exported.

    same_top10: share of the queries whose ten nearest are PyTorch's, in PyTorch's order.
    largest_swap: how far PyTorch's own distances along the exported top-10 are from those
        along its own, as a share of the latter; above 0 only where images changed places.
    """

    batch: int
    queries: int
    gallery: int
    same_top10: float
    largest_swap: float

    @property
    def passed(self) -> bool:
        """Whether only images at practically the same distance changed places."""
        return self.largest_swap <= MOST_SWAPPED


@dataclass(frozen=True)
class Parity:
    """The report of one format."""

    format: str
    outputs: list[OutputParity]
    rankings: list[RankingParity]

    @property
    def passed(self) -> bool:
        """Whether all checks have passed."""
        return all(o.passed for o in self.outputs) and all(r.passed for r in self.rankings)

    def problem(self) -> str:
        """The first check that failed, in words."""
        for output in self.outputs:
            if not output.passed:
                return (
                    f"{self.format} {output.graph} in batches of {output.batch} differs from "
                    f"PyTorch by {output.max_error:.2g} ({output.relative_error:.2g} of the "
                    f"largest entry, at most {MOST_ERROR:g}; cosine {output.min_cosine:.6f}, at "
                    f"least {LEAST_COSINE})"
                )
        for ranking in self.rankings:
            if not ranking.passed:
                return (
                    f"{self.format} in batches of {ranking.batch} ranks another top {TOP} than "
                    f"PyTorch for {1 - ranking.same_top10:.0%} of the queries"
                )
        return ""


class Reference(NamedTuple):
    """What PyTorch computes for N images of each modality: embeddings N×P×D and γ, β of them."""

    embeddings: Mapping[Modality, Tensor]
    modulation: Modulation


@torch.inference_mode()
def reference(model: CMT, images: Mapping[Modality, Tensor]) -> Reference:
    """`CMT.embed` and `CMT.modulation` on the CPU, modulation of all images, "rgb" first."""
    embeddings = {
        modality: torch.cat(
            [model.embed(part, modality) for part in torch.split(images[modality], 8)]
        )
        for modality in MODALITIES
    }
    everything = torch.cat([embeddings[modality] for modality in MODALITIES])
    return Reference(embeddings, model.modulation(everything))


def check_parity(
    name: str,
    runners: Mapping[str, GraphRunner],
    model: CMT,
    images: Mapping[Modality, Tensor],
    expected: Reference,
) -> Parity:
    """Run a format's graphs, by their names, on all images at every batch size."""
    outputs, rankings = [], []
    for batch in BATCHES:
        embeddings = {}
        for modality in MODALITIES:
            graph = embedding_name(modality)
            (embeddings[modality],) = _run(runners[graph], images[modality], batch)
            pair = embeddings[modality], expected.embeddings[modality]
            outputs.append(_output_parity(graph, "embedding", batch, *pair))
        # Of PyTorch's embeddings, so that each graph is judged alone; of its own when ranking.
        given = torch.cat([expected.embeddings[modality] for modality in MODALITIES])
        parameters = zip(
            Modulation._fields,
            _run(runners[MODULATION], given, batch),
            expected.modulation,
            strict=True,
        )
        outputs += [_output_parity(MODULATION, field, batch, *pair) for field, *pair in parameters]
        modulation = Modulation(*_run(runners[MODULATION], embeddings["ir"], batch))
        rankings.append(_ranking_parity(batch, model, embeddings, modulation, expected))
    return Parity(name, outputs, rankings)


def _run(runner: GraphRunner, inputs: Tensor, batch: int) -> list[Tensor]:
    results = [runner(part.contiguous().numpy()) for part in torch.split(inputs, batch)]
    return [torch.cat([torch.from_numpy(a) for a in parts]) for parts in zip(*results, strict=True)]


def _output_parity(
    graph: str, output: str, batch: int, ours: Tensor, theirs: Tensor
) -> OutputParity:
    ours, theirs = ours.double().flatten(1), theirs.double().flatten(1)
    error = float((ours - theirs).abs().max())
    scale = float(theirs.abs().max())
    # β is all zeros before modulation was trained, and 0 has a cosine with nothing.
    directed = theirs.norm(dim=1) > 0
    cosines = functional.cosine_similarity(ours[directed], theirs[directed])
    return OutputParity(
        *(graph, output, batch),
        max_error=error,
        relative_error=error / scale if scale else error,
        min_cosine=float(cosines.min()) if len(cosines) else 1.0,
    )


def _ranking_parity(
    batch: int,
    model: CMT,
    embeddings: Mapping[Modality, Tensor],
    modulation: Modulation,
    expected: Reference,
) -> RankingParity:
    queries = len(embeddings["ir"])
    theirs = _distance(
        model,
        expected.embeddings,
        Modulation(*(parameter[-queries:] for parameter in expected.modulation)),
    )
    ours = _distance(model, embeddings, modulation)
    own, exported = (d.argsort(dim=1, stable=True)[:, :TOP] for d in (theirs, ours))
    along_own, along_exported = theirs.gather(1, own), theirs.gather(1, exported)
    swap = (along_exported - along_own).abs() / along_own.clamp(min=1e-12)
    return RankingParity(
        batch=batch,
        queries=queries,
        gallery=ours.shape[1],
        same_top10=float((own == exported).all(dim=1).double().mean()),
        largest_swap=float(swap.max()),
    )


def _distance(model: CMT, embeddings: Mapping[Modality, Tensor], modulation: Modulation) -> Tensor:
    """Infrared queries against the visible gallery in float64, Q×N."""
    return model.distance(
        embeddings["ir"].double(),
        embeddings["rgb"].double(),
        Modulation(*(parameter.double() for parameter in modulation)),
    )
