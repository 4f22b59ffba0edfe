"""What an evaluation says: figures of every search, over all trials, and of both modules.

`evaluate_model` computes it for one checkpoint, `summarise` joins several (RegDB has a model for
each trial); `training.evaluation.tables` shows it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import numpy as np

from model import CMT, Calibration, Strength
from model.config import MODALITIES
from training.datasets import DatasetName, Sample
from training.evaluation.embedding import Embedded, embed_samples
from training.evaluation.identification import (
    LIKELY,
    NONE,
    Answers,
    Identification,
    Kind,
    identifications,
    open_set_answers,
)
from training.evaluation.metrics import QueryScores, mean_precision
from training.evaluation.module_diagnostics import (
    CompensationDiagnostics,
    ModulationDiagnostics,
    bootstrap_interval,
    diagnose_compensation,
)
from training.evaluation.open_set import FALSE_ALARM_RATES
from training.evaluation.scoring import SplitScores, score_splits
from training.evaluation.splits import MIXED, Split
from training.evaluation.ways import NAMES

CMC_LENGTH = 20


@dataclass(frozen=True)
class TrialSpread:
    """Mean and population standard deviation of a figure over the trials, as a fraction."""

    mean: float
    std: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "TrialSpread":
        """Of one value per trial."""
        return cls(float(np.mean(values)), float(np.std(values)))

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.std:.2f}"


@dataclass(frozen=True)
class RankingFigures:
    """The protocol's figures for one way of ranking; cmc is the mean over trials, rank 1 to 20."""

    rank_1: TrialSpread
    rank_5: TrialSpread
    rank_10: TrialSpread
    rank_20: TrialSpread
    mean_ap: TrialSpread
    mean_inp: TrialSpread
    cmc: tuple[float, ...]

    @classmethod
    def over(cls, trials: Sequence[QueryScores]) -> "RankingFigures":
        """Over one entry per trial. Raises ValueError where no query of a trial has a positive."""
        summaries = [scores.summary(CMC_LENGTH) for scores in trials]

        def rank(k: int) -> TrialSpread:
            return TrialSpread.over([float(summary.cmc[k - 1]) for summary in summaries])

        return cls(
            rank_1=rank(1),
            rank_5=rank(5),
            rank_10=rank(10),
            rank_20=rank(20),
            mean_ap=TrialSpread.over([summary.mean_ap for summary in summaries]),
            mean_inp=TrialSpread.over([summary.mean_inp for summary in summaries]),
            cmc=tuple(np.mean([summary.cmc for summary in summaries], axis=0).tolist()),
        )


@dataclass(frozen=True)
class OpenSetRate:
    """The detection-and-identification rate at rank 1 for one score and false-alarm rate.

    score: "modulated distance", … (see `SplitScores`). rate: over trials; None where a trial has
    too few non-mated queries to tell.
    """

    score: str
    false_alarm_rate: float
    rate: TrialSpread | None


@dataclass(frozen=True)
class OpenSetEvaluation:
    """Open-set identification (see `training.evaluation.open_set`); sizes are means over trials."""

    mated: float
    non_mated: float
    rates: list[OpenSetRate]


@dataclass(frozen=True)
class ExplainedAnswers:
    """What explained first answers say, over the trials, see `training.evaluation.explained`.

    answers: right ones of a trial, mean; as many wrong ones. parts, agreement: areas under the ROC
    curve of right against wrong.
    """

    answers: float
    parts: TrialSpread
    agreement: TrialSpread


@dataclass(frozen=True)
class SplitEvaluation:
    """One search; figures are fractions in [0, 1].

    setting, shots: as in published tables, see `Split`.
    title: both in words.
    convention: "official", "seeded", "whole" or "authors", see `Split`.
    trials: galleries, over all models.
    identities, queries, gallery: sizes, mean over trials (queries: those that have a positive).
    rankings: by the way of ranking, see `SplitScores`; in JSON each is an entry beside the others,
        "raw" and "reranked" null where there are none.
    modulation: None where the network has no instance alignment.
    open_set: with half of the identities enrolled.
    explained: None where a network has no fit of agreement for this search, or no trial has both
        right and wrong first answers.
    """

    setting: str
    shots: str
    title: str
    convention: str
    trials: int
    identities: float
    queries: float
    gallery: float
    rankings: dict[str, RankingFigures]
    modulation: ModulationDiagnostics | None
    open_set: OpenSetEvaluation
    explained: ExplainedAnswers | None

    @property
    def mixed(self) -> bool:
        """Whether galleries hold both modalities."""
        return self.setting.startswith(MIXED)

    @property
    def modulated(self) -> RankingFigures:
        """With the query's γ, β."""
        return self.rankings["modulated"]

    @property
    def unmodulated(self) -> RankingFigures:
        """With γ = 1, β = 0."""
        return self.rankings["unmodulated"]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        entry = asdict(self)
        rankings: dict[str, Any] = entry.pop("rankings")
        return entry | {"raw": None, "reranked": None} | rankings


@dataclass(frozen=True)
class Evaluation:
    """Everything an evaluation says.

    dataset: the layout's name.
    metric: the distance that ranks, "euclidean" or "cosine".
    mirror: whether the mirror image is part of what is ranked.
    strengths: of the modulation, s and c of every checkpoint; null where γ, β are as trained.
    models: how many checkpoints the figures are over (ten for RegDB's ten trials).
    splits: the protocol's searches.
    identification: open-set searches judged by their probabilities, by kind of gallery; none where
        a checkpoint has no fits of them.
    compensation: per missing modality; None where the network has no modality alignment.
    """

    dataset: str
    metric: str
    mirror: bool
    strengths: list[Strength | None]
    models: int
    splits: list[SplitEvaluation]
    identification: list[Identification]
    compensation: dict[str, CompensationDiagnostics | None] | None

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        strengths = [strength and strength._asdict() for strength in self.strengths]
        splits = [split.to_json() for split in self.splits]
        found = asdict(self) | {"strengths": strengths, "splits": splits}
        if self.identification:
            found["cut_offs"] = {"likely": LIKELY, "none": NONE}
        return found


@dataclass(frozen=True)
class ModelScores:
    """What one network contributes to an evaluation."""

    splits: list[SplitScores]
    answers: dict[Kind, Answers]
    compensation: dict[str, CompensationDiagnostics | None] | None
    metric: str
    mirror: bool
    strength: Strength | None
    instance_alignment: bool


def score_model(
    model: CMT,
    samples: Sequence[Sample],
    splits: Sequence[Split],
    *,
    calibration: Calibration | None = None,
    judged: bool = True,
    rerank: bool = False,
    compare_mirror: bool = False,
    batch_size: int = 64,
    workers: int = 0,
) -> ModelScores:
    """Embed all samples on the device that the network is on, and score every search.

    calibration: the checkpoint's, for rankings and probabilities as served. judged: whether
    open-set figures are by its scores beside those by distance.
    compare_mirror: embed once more, without the mirror image where the checkpoint has it, else
    with it.
    Raises DatasetError where an image cannot be decoded, ValueError where the network's output is
    not finite.
    """
    embedded = embed_samples(model, samples, batch_size=batch_size, workers=workers)
    mirror = not model.config.mirror
    other = (
        embed_samples(model, samples, batch_size=batch_size, workers=workers, mirror=mirror)
        if compare_mirror
        else None
    )
    return ModelScores(
        splits=score_splits(
            *(model, embedded, splits),
            rerank=rerank,
            calibration=calibration,
            judged=judged,
            other=other,
        ),
        answers=open_set_answers(model, embedded, splits[0].protocol, calibration),
        compensation=_compensation(embedded),
        metric=model.config.metric,
        mirror=model.config.mirror,
        strength=model.strength,
        instance_alignment=model.config.instance_alignment,
    )


def summarise(dataset: DatasetName, scores: Sequence[ModelScores]) -> Evaluation:
    """Figures over all trials of all models; every model has the same searches.

    Raises ValueError where no query of a trial has a positive.
    """
    return Evaluation(
        dataset=dataset.value,
        metric=scores[0].metric,
        mirror=scores[0].mirror,
        strengths=[model.strength for model in scores],
        models=len(scores),
        splits=[
            _summarise_split(of_models, scores[0].instance_alignment)
            for of_models in zip(*(model.splits for model in scores), strict=True)
        ],
        identification=identifications([model.answers for model in scores]),
        compensation=_mean_compensation([model.compensation for model in scores]),
    )


def evaluate_model(
    dataset: DatasetName,
    model: CMT,
    samples: Sequence[Sample],
    splits: Sequence[Split],
    *,
    rerank: bool = False,
    batch_size: int = 64,
    workers: int = 0,
) -> Evaluation:
    """`score_model` and `summarise` for one network, with the errors of both."""
    scores = score_model(
        model, samples, splits, rerank=rerank, batch_size=batch_size, workers=workers
    )
    return summarise(dataset, [scores])


def _summarise_split(models: Sequence[SplitScores], instance_alignment: bool) -> SplitEvaluation:
    split = models[0].split
    trials = {way: _trials(models, way) for way in NAMES}
    modulated = trials["modulated"]
    galleries = [gallery.size for model in models for gallery in model.split.galleries]
    return SplitEvaluation(
        setting=split.setting,
        shots=split.shots,
        title=split.title,
        convention=split.convention,
        trials=len(modulated),
        identities=float(np.mean([model.identities for model in models])),
        queries=float(np.mean([trial.answerable.sum() for trial in modulated])),
        gallery=float(np.mean(galleries)),
        rankings={way: RankingFigures.over(of_way) for way, of_way in trials.items() if of_way},
        modulation=_modulation_diagnostics(models) if instance_alignment else None,
        open_set=_open_set(models),
        explained=_explained(models),
    )


def _trials(models: Sequence[SplitScores], way: str) -> list[QueryScores]:
    """Of all models; none where a model does not have this way, so that no mean is of some only."""
    found = [model.rankings.get(way) for model in models]
    if way == "as_trained" and any(found):  # without a strength, a network ranks as trained
        found = [of or model.modulated for of, model in zip(found, models, strict=True)]
    if not all(found):
        return []
    return [trial for of_model in found for trial in of_model or ()]


def _open_set(models: Sequence[SplitScores]) -> OpenSetEvaluation:
    # Of several checkpoints, some may have no calibration: a mean over the others would mislead.
    names = [name for name in models[0].open_set if all(name in m.open_set for m in models)]
    trials = {name: [t for model in models for t in model.open_set[name]] for name in names}
    sizes = trials[names[0]]
    rates = []
    for name in names:
        for place, false_alarm_rate in enumerate(FALSE_ALARM_RATES):
            found = [d for trial in trials[name] if (d := trial.dirs[place]) is not None]
            spread = TrialSpread.over(found) if len(found) == len(trials[name]) else None
            rates.append(OpenSetRate(name, false_alarm_rate, spread))
    return OpenSetEvaluation(
        mated=float(np.mean([trial.mated for trial in sizes])),
        non_mated=float(np.mean([trial.non_mated for trial in sizes])),
        rates=rates,
    )


def _explained(models: Sequence[SplitScores]) -> ExplainedAnswers | None:
    if not all(model.explained for model in models):
        return None
    trials = [trial for model in models for trial in model.explained]
    return ExplainedAnswers(
        answers=float(np.mean([trial.answers for trial in trials])),
        parts=TrialSpread.over([trial.parts for trial in trials]),
        agreement=TrialSpread.over([trial.agreement for trial in trials]),
    )


def _modulation_diagnostics(models: Sequence[SplitScores]) -> ModulationDiagnostics:
    gains, people = [], []
    for model in models:
        modulated, unmodulated = model.compared
        precision, answerable = mean_precision(modulated)
        plain, _ = mean_precision(unmodulated)
        gains.append((precision - plain)[answerable])
        people.append(model.query_people[answerable])
    # A person who is tested in several of RegDB's trials is drawn with all of them.
    low, high = bootstrap_interval(np.concatenate(gains), np.concatenate(people))
    changes = np.mean([change for model in models for change in model.top_changes], axis=0)
    gamma_mean, gamma_std, beta_to_feature = np.mean([m.gamma_beta for m in models], axis=0)
    return ModulationDiagnostics(
        gamma_mean=float(gamma_mean),
        gamma_std=float(gamma_std),
        beta_to_feature=float(beta_to_feature),
        top10_changed=float(changes[0]),
        top10_reordered=float(changes[1]),
        map_gain=float(np.concatenate(gains).mean()),
        map_gain_low=low,
        map_gain_high=high,
    )


def _compensation(embedded: Embedded) -> dict[str, CompensationDiagnostics | None] | None:
    if embedded.compensated is None:
        return None
    return {
        missing: diagnose_compensation(
            embedded.samples, embedded.features, embedded.compensated, missing
        )
        for missing in MODALITIES
    }


def _mean_compensation(
    models: Sequence[dict[str, CompensationDiagnostics | None] | None],
) -> dict[str, CompensationDiagnostics | None] | None:
    """Each figure's mean over the models that have it."""
    if models[0] is None:
        return None
    means: dict[str, CompensationDiagnostics | None] = {}
    for missing in models[0]:
        judged = [c for model in models if model and (c := model[missing]) is not None]
        figures = {
            field.name: float(np.mean([getattr(c, field.name) for c in judged]))
            for field in fields(CompensationDiagnostics)
            if judged
        }
        if figures:
            images = round(figures.pop("images"))
            means[missing] = CompensationDiagnostics(images=images, **cast(Any, figures))
        else:
            means[missing] = None
    return means
