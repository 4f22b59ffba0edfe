"""One try at a γ, β of the query's own that pays: generators for people the backbone has not seen.

Generators that learn beside the backbone, or on people it was trained on, see embeddings that tell
those people apart already, and learn them by heart. Here the backbone is fixed, the people that the
generators are fitted to are new to it, and little is fitted: with u the query's pooled embedding
minus the mean of its modality,

    γ = c·(1 + a + A_γ B u),    β = b + A_β B u,

of low rank R (B is R×D, A_γ and A_β are D×R), and all but the constant c is drawn to zero, where
every ranking is the unmodulated one. Without A u, γ and β are the same for every query. What the
query's own part is worth is the ranking by its γ, β minus that by their mean over the queries, on
people who were neither fitted to nor chosen on.

Embeddings are computed once, so that a fit takes seconds. No checkpoint is written.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from model import CMT, CheckpointInfo, Modulation, load_checkpoint
from model.machine import machine
from training.ablation.cells import AblationData
from training.ablation.controls import ranking_under, scores_under
from training.ablation.paired import PairedComparison, SeedSpread, compare_paired
from training.ablation.render import Grid
from training.ablation.results import MEAN, UNMODULATED, RankingResult
from training.ablation.table3 import FIGURE_COLUMNS, comparison_grid
from training.datasets import Sample
from training.evaluation.embedding import Embedded, embed_samples
from training.evaluation.metrics import mean_precision
from training.evaluation.protocols import protocol_splits
from training.evaluation.scoring import mean_modulation
from training.evaluation.splits import Split
from training.learnt import refuse_known_people
from training.losses import modulation_discriminative
from training.sampler import IdentityBalancedSampler

OWN = "own γ, β"
RATE = 0.01  # of Adam, with half a cosine down to 0
TEMPERATURE = 0.05  # of L_mod, as in the recipe `ablation`
PEOPLE, IMAGES = 32, 2  # of a batch: people, and images of each in each modality


@dataclass(frozen=True)
class Setting:
    """What is chosen: the rank R, and the weight by which γ/c − 1 and β are drawn to zero."""

    rank: int
    decay: float


@dataclass(frozen=True)
class GeneratorsRequest:
    """What is tried: every setting with every seed, `steps` batches each.

    checkpoint: the backbone. device: where it embeds, "cpu", "cuda", ….
    """

    checkpoint: Path
    ranks: Sequence[int]
    decays: Sequence[float]
    seeds: Sequence[int]
    steps: int
    device: str = "cpu"

    @property
    def settings(self) -> list[Setting]:
        """Every rank with every decay."""
        return [Setting(*pair) for pair in itertools.product(self.ranks, self.decays)]


@dataclass(frozen=True)
class Tried:
    """A setting and its mAP on the people it is chosen on, one entry a seed."""

    setting: Setting
    own: list[float]
    mean: list[float]


@dataclass(frozen=True)
class GeneratorsTrial:
    """What came of it.

    search: of the test people. people: the person of each of its queries that has an answer.
    rankings: by name, one entry a seed, with the chosen setting.
    """

    info: CheckpointInfo
    tried: list[Tried]
    chosen: Setting
    search: Split
    people: list[int]
    rankings: dict[str, list[RankingResult]]
    comparisons: list[PairedComparison]
    seconds: float


class LowRankGenerators(nn.Module):
    """γ, β as the module's docstring has them, of P×D embeddings of a known modality."""

    centres: Tensor
    spread: Tensor
    unit: Tensor

    def __init__(self, embedded: Embedded, rank: int) -> None:
        """Begin at γ = 1, β = 0. embedded: the images to be fitted to, of both modalities."""
        super().__init__()
        pooled, is_ir = embedded.embedding.mean(dim=1), _is_ir(embedded.samples)
        centres = torch.stack([pooled[is_ir == ir].mean(dim=0) for ir in (False, True)])
        dim = pooled.shape[1]
        self.register_buffer("centres", centres)  # of visible and infrared images, 2×D
        self.register_buffer("spread", (pooled - centres[is_ir.long()]).square().mean().sqrt())
        self.register_buffer("unit", embedded.embedding.square().mean().sqrt())
        self.log_constant = nn.Parameter(torch.zeros(()))  # ln c
        self.shared = nn.Parameter(torch.zeros(2, dim))  # a and b
        self.inner = nn.Linear(dim, rank, bias=False)  # B
        self.outer = nn.Linear(rank, 2 * dim, bias=False)  # A_γ and A_β
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor, is_ir: Tensor) -> tuple[Modulation, Tensor]:
        """Queries Q×P×D → γ, β of Q×D each, and Q×2×D that is 0 where they do nothing.

        The latter is γ/c − 1 and β, the latter in units of an embedding's numbers.
        """
        pooled = (x.mean(dim=1) - self.centres[is_ir.long()]) / self.spread
        offsets = self.shared + self.outer(self.inner(pooled)).unflatten(1, (2, -1))
        gamma, beta = offsets.unbind(1)
        return Modulation(self.log_constant.exp() * (1 + gamma), self.unit * beta), offsets


def fit_generators(
    embedded: Embedded, setting: Setting, *, steps: int, seed: int
) -> LowRankGenerators:
    """By the softmax form of L_mod with candidates of the other modality, as the recipes train.

    Raises TrainingSetError where someone lacks a modality.
    """
    torch.manual_seed(seed)
    generators = LowRankGenerators(embedded, setting.rank)
    people = len({sample.person_id for sample in embedded.samples})
    sampler = IdentityBalancedSampler(embedded.samples, min(PEOPLE, people), IMAGES, seed)
    optimiser = torch.optim.Adam(generators.parameters(), lr=RATE)
    schedule = CosineAnnealingLR(optimiser, steps)
    temperature = TEMPERATURE * float(embedded.embedding.flatten(1).square().sum(1).mean())
    for step in range(steps):
        batch = sampler.batch(step)
        x, is_ir = embedded.embedding[torch.from_numpy(batch.rows)], torch.from_numpy(batch.is_ir)
        modulation, offsets = generators(x, is_ir)
        loss = modulation_discriminative(
            *(x, modulation, torch.from_numpy(batch.labels), is_ir),
            form="softmax",
            temperature=temperature,
            across_modalities=True,
        )
        optimiser.zero_grad(set_to_none=True)
        (loss + setting.decay * offsets.square().sum(1).mean()).backward()
        optimiser.step()
        schedule.step()
    return generators.eval()


def try_generators(
    request: GeneratorsRequest, data: AblationData, say: Callable[[str], object] = lambda _: None
) -> GeneratorsTrial:
    """Fit to `data.training`, choose the setting on `data.selection`, report on `data.test`.

    Raises DatasetError where the backbone was trained on any of them, and CheckpointError.
    """
    started = time.monotonic()
    model, info = load_checkpoint(request.checkpoint, request.device)
    sides = (data.training, data.selection, data.test)
    for samples in sides:
        refuse_known_people(info, samples, data.dataset, data.name)
    fitted, chosen_on, tested = (embed_samples(model, samples) for samples in sides)
    say(f"embedded {sum(map(len, sides)):,} images in {time.monotonic() - started:.0f} s")
    selection = protocol_splits(data.dataset, data.selection)[0]
    search = data.splits[0]

    found: dict[Setting, list[LowRankGenerators]] = {}
    tried = []
    for setting in request.settings:
        found[setting] = [
            fit_generators(fitted, setting, steps=request.steps, seed=seed)
            for seed in request.seeds
        ]
        rankings = [_rankings(model, chosen_on, selection, of) for of in found[setting]]
        own, mean = ([r[way].mean("mean_ap") for r in rankings] for way in (OWN, MEAN))
        tried.append(Tried(setting, own, mean))
        say(
            f"rank {setting.rank}, decay {setting.decay:g}: mAP by the {OWN} "
            f"{SeedSpread.over(own)}, by the {MEAN} {SeedSpread.over(mean)}"
        )
    chosen = max(tried, key=lambda one: SeedSpread.over(one.own).mean).setting
    of_seeds = [_rankings(model, tested, search, of) for of in found[chosen]]
    by_way = {way: [of_seed[way] for of_seed in of_seeds] for way in of_seeds[0]}
    people = _answered_people(model, tested, search)
    comparisons = [
        compare_paired(f"{one} − {other}", by_way[one], by_way[other], people)
        for one, other in ((OWN, MEAN), (OWN, UNMODULATED), (MEAN, UNMODULATED))
    ]
    return GeneratorsTrial(
        info=info,
        tried=tried,
        chosen=chosen,
        search=search,
        people=people,
        rankings=by_way,
        comparisons=comparisons,
        seconds=time.monotonic() - started,
    )


def _rankings(
    model: CMT, embedded: Embedded, split: Split, generators: LowRankGenerators
) -> dict[str, RankingResult]:
    """A search by the queries' own γ, β, by their mean and without them."""
    rows = torch.from_numpy(split.queries)
    with torch.no_grad():
        own, _ = generators(embedded.embedding[rows], _is_ir(embedded.samples)[rows])
    ways = {
        OWN: own,
        MEAN: mean_modulation(own),
        UNMODULATED: Modulation.identity(*own.gamma.shape),
    }
    return {way: ranking_under(model, embedded, split, of) for way, of in ways.items()}


def _answered_people(model: CMT, embedded: Embedded, split: Split) -> list[int]:
    """The person of each query that has a positive, in the order of a ranking's precisions."""
    plain = Modulation.identity(split.queries.size, embedded.embedding.shape[2])
    _, answerable = mean_precision(scores_under(model, embedded, split, plain))
    return [embedded.samples[place].person_id for place in split.queries[answerable].tolist()]


def _is_ir(samples: Sequence[Sample]) -> Tensor:
    return torch.tensor([sample.modality == "ir" for sample in samples])


def trial_grids(trial: GeneratorsTrial, seeds: Sequence[int]) -> list[Grid]:
    """What every setting reached where it was chosen, then the test people and paired tests."""
    chosen = f"rank {trial.chosen.rank}, decay {trial.chosen.decay:g}"
    over = f"Percent, mean ± sample deviation over seeds {', '.join(map(str, seeds))}."
    sizes = f"{len(set(trial.people))} identities, {len(trial.people)} queries"
    return [
        Grid(
            title="Settings, on the people they are chosen on",
            header=["rank, decay", f"mAP, {OWN}", f"mAP, {MEAN}"],
            rows=[
                [
                    f"{one.setting.rank}, {one.setting.decay:g}",
                    str(SeedSpread.over(one.own)),
                    str(SeedSpread.over(one.mean)),
                ]
                for one in trial.tried
            ],
            notes=[f"{over} Chosen by the mAP of the {OWN}: {chosen}."],
        ),
        Grid(
            title=f"Generators for new people, {trial.search.title}",
            header=["ranking", *(name for name, _ in FIGURE_COLUMNS)],
            rows=[
                [
                    way,
                    *(
                        str(SeedSpread.over([one.mean(figure) for one in of_way]))
                        for _, figure in FIGURE_COLUMNS
                    ),
                ]
                for way, of_way in trial.rankings.items()
            ],
            notes=[f"{over} {sizes}; {chosen}."],
        ),
        comparison_grid(trial.comparisons),
    ]


def trial_json(
    request: GeneratorsRequest, trial: GeneratorsTrial, data: AblationData
) -> dict[str, Any]:
    """Everything as plain values, every query's average precision among them."""
    return {
        "ablation": "generators for new people",
        "checkpoint": {"file": request.checkpoint.name, "fingerprint": trial.info.fingerprint},
        "data": data.facts,
        "seeds": list(request.seeds),
        "steps": request.steps,
        "tried": [asdict(one) for one in trial.tried],
        "chosen": asdict(trial.chosen),
        "search": trial.search.title,
        "query_people": trial.people,
        "rankings": {
            way: [one.model_dump(mode="json") for one in of_way]
            for way, of_way in trial.rankings.items()
        },
        "comparisons": [asdict(comparison) for comparison in trial.comparisons],
        "seconds": round(trial.seconds, 1),
        "machine": machine(),
    }
