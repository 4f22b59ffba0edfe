"""Figures that papers state, carried along to stand beside ours. None is measured here."""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from training.datasets import DatasetName

FILE = Path(__file__).parent / "published.csv"
# The names that the file has for our datasets; sets that are not here have no published rows.
TITLES = {DatasetName.SYSU: "SYSU-MM01", DatasetName.REGDB: "RegDB"}


@dataclass(frozen=True)
class PublishedRow:
    """One method in one setting; figures in percent, None where the paper gives none."""

    dataset: str
    method: str
    venue: str
    setting: str
    shots: str
    rank_1: float | None
    rank_10: float | None
    rank_20: float | None
    mean_ap: float | None


@cache
def published_rows(dataset: str) -> tuple[PublishedRow, ...]:
    """Rows of a table of the CMT paper, in its order; `dataset` as in the file's first column."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(
            PublishedRow(
                dataset=row["dataset"],
                method=row["method"],
                venue=row["venue"],
                setting=row["setting"],
                shots=row["shots"],
                rank_1=_figure(row["rank1"]),
                rank_10=_figure(row["rank10"]),
                rank_20=_figure(row["rank20"]),
                mean_ap=_figure(row["map"]),
            )
            for row in csv.DictReader(file)
            if row["dataset"] == dataset
        )


def _figure(text: str) -> float | None:
    return float(text) if text else None
