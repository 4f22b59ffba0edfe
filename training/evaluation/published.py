"""Figures that papers state, carried along to stand beside ours. None is measured here.

`published.csv` holds every row of the tables of the CMT paper. `published_since.csv` holds later
work and LLCM, each row with its source: the paper's own table, the README of its code, or the work
that quotes it. A method that re-ranks its answers is a row of its own ("BIT+rerank").
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from training.datasets import DatasetName

FOLDER = Path(__file__).parent
FILES = (FOLDER / "published.csv", FOLDER / "published_since.csv")
PAPER = "CMT, ECCV 2022"  # the source of every row of the first file
# The names that the files have for our datasets; sets that are not here have no published rows.
TITLES = {
    DatasetName.SYSU: "SYSU-MM01",
    DatasetName.REGDB: "RegDB",
    DatasetName.LLCM: "LLCM",
}


@dataclass(frozen=True)
class PublishedRow:
    """One method in one setting; figures in percent, None where the source gives none."""

    dataset: str
    method: str
    venue: str
    setting: str
    shots: str
    rank_1: float | None
    rank_10: float | None
    rank_20: float | None
    mean_ap: float | None
    source: str


@cache
def published_rows(dataset: str) -> tuple[PublishedRow, ...]:
    """Rows of a data set, those of the CMT paper first; `dataset` as in the first column."""
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
            source=row.get("source", PAPER),
        )
        for path in FILES
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        if row["dataset"] == dataset
    )


def _figure(text: str) -> float | None:
    return float(text) if text else None
