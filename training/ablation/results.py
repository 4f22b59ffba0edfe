"""What one cell of an ablation measured, as it is written to the cell's folder and read again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from training.evaluation.metrics import QueryScores, mean_precision
from training.evaluation.module_diagnostics import CompensationDiagnostics, ModulationDiagnostics
from training.evaluation.report import SplitEvaluation
from training.evaluation.scoring import SplitScores
from training.files import write_file

# The ways of ranking, as tables name them.
MODULATED, UNMODULATED = "modulated", "unmodulated"
WEAKENED, MEAN = "strength s", "mean γ, β"

_NUMBERS = re.compile(r"\[\s+(-?\d[-+.,\deE\s]*)\s+\]")


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrialFigures(_Stored):
    """The protocol's figures of one trial, fractions in [0, 1]."""

    rank_1: float
    rank_5: float
    rank_10: float
    rank_20: float
    mean_ap: float
    mean_inp: float


class RankingResult(_Stored):
    """One way of ranking: figures per trial, and each query's AP as its mean over the trials."""

    trials: list[TrialFigures]
    average_precision: list[float]

    @classmethod
    def over(cls, trials: Sequence[QueryScores]) -> RankingResult:
        """Of the queries that have a positive in the gallery; ValueError where none has."""
        figures = []
        for scores in trials:
            summary = scores.summary(20)
            ranks = {f"rank_{k}": float(summary.cmc[k - 1]) for k in (1, 5, 10, 20)}
            figures.append(
                TrialFigures(**ranks, mean_ap=summary.mean_ap, mean_inp=summary.mean_inp)
            )
        precision, answerable = mean_precision(trials)
        kept = precision[answerable]
        return cls(trials=figures, average_precision=[round(float(ap), 6) for ap in kept])

    def mean(self, figure: str) -> float:
        """Mean over the trials of one of `TrialFigures`."""
        return float(np.mean([getattr(trial, figure) for trial in self.trials]))


class SearchResult(_Stored):
    """One search of the protocol, see `SplitEvaluation`.

    `query_people` is the person of every query in the order of `average_precision`. Where the
    network has no instance alignment it ranks without γ, β, and all rankings but `unmodulated` are
    None. `mean_modulation`, `weakened`: see `training.ablation.controls`; None in results of
    earlier releases, and the second where no strength was chosen.
    """

    setting: str
    shots: str
    title: str
    convention: str
    identities: int
    gallery: float
    query_people: list[int]
    modulated: RankingResult | None
    unmodulated: RankingResult
    modulation: ModulationDiagnostics | None
    mean_modulation: RankingResult | None = None
    weakened: RankingResult | None = None

    @classmethod
    def of(cls, scores: SplitScores, summary: SplitEvaluation) -> SearchResult:
        """From what the evaluation computed of one search."""
        has_modulation = summary.modulation is not None
        _, answerable = mean_precision(scores.unmodulated)
        return cls(
            setting=summary.setting,
            shots=summary.shots,
            title=summary.title,
            convention=summary.convention,
            identities=scores.identities,
            gallery=summary.gallery,
            query_people=scores.query_people[answerable].tolist(),
            modulated=RankingResult.over(scores.modulated) if has_modulation else None,
            unmodulated=RankingResult.over(scores.unmodulated),
            modulation=summary.modulation,
        )

    @property
    def own(self) -> RankingResult:
        """The network's own ranking: modulated where it has instance alignment."""
        return self.modulated or self.unmodulated

    @property
    def rankings(self) -> dict[str, RankingResult]:
        """The ways of ranking by their names in tables, its own first."""
        rankings = {
            MODULATED: self.modulated,
            WEAKENED: self.weakened,
            MEAN: self.mean_modulation,
            UNMODULATED: self.unmodulated,
        }
        return {name: ranking for name, ranking in rankings.items() if ranking is not None}


class ChosenStrength(_Stored):
    """A strength s of modulation and its centre c: γ' = c + s·(γ − c), β' = s·β.

    tried, mean_ap: every strength that was tried and its mAP, on the people it was chosen on.
    """

    strength: float
    centre: float
    tried: list[float]
    mean_ap: list[float]


class CellResult(_Stored):
    """One cell: what was trained (`settings`), and the figures of its checkpoint.

    strength: that of the ranking `weakened`; None where none was chosen.
    """

    name: str
    row: str
    seed: int
    fingerprint: str
    steps: int
    seconds: float
    settings: dict[str, Any]
    machine: dict[str, Any]
    searches: list[SearchResult]
    compensation: dict[str, CompensationDiagnostics | None] | None
    strength: ChosenStrength | None = None

    @property
    def first(self) -> SearchResult:
        """The search that tables and paired tests are about (SYSU-MM01: all, single-shot)."""
        return self.searches[0]

    def for_report(self) -> dict[str, Any]:
        """Everything but recipe and data, which a report states once, and the queries of other
        searches than the first."""
        content = self.model_dump(mode="json", exclude={"settings"})
        content["start"] = self.settings["start"]
        for search in content["searches"][1:]:
            del search["query_people"]
            for ranking in search.values():
                if isinstance(ranking, dict):
                    ranking.pop("average_precision", None)
        return content


def whole_seeds(results: Sequence[CellResult], rows: Sequence[str]) -> list[int]:
    """The seeds that every one of `rows` has a result for: means over others would not compare."""
    there = {(result.row, result.seed) for result in results}
    seeds = sorted({seed for _, seed in there})
    return [seed for seed in seeds if all((row, seed) in there for row in rows)]


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by indented JSON in which every list of numbers is on one line."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    write_file(path, text + "\n")
