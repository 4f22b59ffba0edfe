"""The paper's Table 3: the base, each module alone, both; over seeds, with paired tests.

Two rows that the paper does not have tell modulation from the loss that trains it: L_mod with γ = 1
and β = 0, without and with modality alignment. No γ or β exists there, so that what such a row
gains over the one without L_mod is F trained by L_mod, and what instance alignment gains over it is
modulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from training.ablation.cells import Cell, Start, switched
from training.ablation.paired import PairedComparison, SeedSpread, compare_paired
from training.ablation.render import Grid
from training.ablation.report import Ablation, Summary
from training.ablation.results import (
    MEAN,
    MODULATED,
    UNMODULATED,
    WEAKENED,
    CellResult,
    RankingResult,
    whole_seeds,
)
from training.datasets import DatasetName
from training.evaluation.published import published_rows
from training.evaluation.tables import PUBLISHED_QUERIES
from training.recipe import Recipe

PUBLISHED = "SYSU-MM01 ablation (Table 3)"  # the name in published.csv
FIGURE_COLUMNS = (
    ("rank-1", "rank_1"),
    ("rank-10", "rank_10"),
    ("rank-20", "rank_20"),
    ("mAP", "mean_ap"),
    ("mINP", "mean_inp"),
)


NOT_COMPARABLE = (
    "This is not the published test set, so that published figures do not compare in height."
)


@dataclass(frozen=True)
class Table3Row:
    """A row of Table 3; `title` of a row of the paper's is the method's name in published.csv.

    plain_l_mod: L_mod with γ = 1, β = 0 in the place of instance alignment.
    """

    name: str
    title: str
    modality_alignment: bool
    instance_alignment: bool
    plain_l_mod: bool = False


BASE = Table3Row("base", "base", False, False)
MAM = Table3Row("mam", "base+MAM", True, False)
IAM = Table3Row("iam", "base+IAM", False, True)
BOTH = Table3Row("mam-iam", "base+MAM+IAM", True, True)
PLAIN = Table3Row("l-mod", "base, L_mod with γ = 1, β = 0", False, False, True)
MAM_PLAIN = Table3Row("mam-l-mod", "base+MAM, L_mod with γ = 1, β = 0", True, False, True)
BASE_TITLE = "base*"  # of our own figures: a footnote names the settings that differ from HCT's
ROWS = (BASE, MAM, IAM, BOTH, PLAIN, MAM_PLAIN)
# The paper's order: the first of each pair above the second.
PAPER_ORDER = ((MAM, BASE), (IAM, BASE), (BOTH, BASE), (BOTH, MAM), (BOTH, IAM))
COMPARED = (*PAPER_ORDER, (PLAIN, BASE), (IAM, PLAIN), (MAM_PLAIN, MAM), (BOTH, MAM_PLAIN))
COMPARED_WAYS = (
    (MODULATED, UNMODULATED),
    (MODULATED, MEAN),
    (WEAKENED, MODULATED),
    (WEAKENED, UNMODULATED),
)


def table3_cells(recipe: Recipe, start: Start, seeds: Sequence[int]) -> list[Cell]:
    """All rows of the first seed, then of the next: an interrupted ablation has whole seeds.

    Nothing but the switches of the two modules, and of L_mod without generators, differs between
    the rows.
    """
    return [Cell(row.name, seed, row_recipe(recipe, row), start) for seed in seeds for row in ROWS]


def table3_ablation(recipe: Recipe, start: Start, seeds: Sequence[int]) -> Ablation:
    """Table 3: its cells, and the tables of those that are finished."""

    def summarise(results: Sequence[CellResult]) -> Summary | None:
        table = summarise_table3(results)
        if table is None:
            return None
        return Summary(grids(table, recipe), table3_json(table, recipe))

    return Ablation("Table 3", recipe, table3_cells(recipe, start, seeds), summarise)


def row_recipe(recipe: Recipe, row: Table3Row) -> Recipe:
    """`recipe` with the modules of a row."""
    return switched(
        recipe,
        modality_alignment=row.modality_alignment,
        instance_alignment=row.instance_alignment,
        plain_l_mod=row.plain_l_mod,
    )


def hct_settings(recipe: Recipe) -> dict[str, Any]:
    """The four points in which HCT's public settings differ from the paper's base, as set here.

    docs/ablation.md says what they are in HCT's code.
    """
    return {
        "triplet_parts_weight": recipe.stages[-1].weights.triplet_parts,
        "normalise_test": recipe.model.normalise_test,
        "label_smoothing": recipe.label_smoothing,
        "warmup_steps": recipe.stages[0].warmup_steps,
    }


def hct_words(recipe: Recipe) -> str:
    """The same as the footnote that belongs to every figure of a base."""
    words = ", ".join(f"{name} {_word(value)}" for name, value in hct_settings(recipe).items())
    return f"{BASE_TITLE}: {words} (where the public settings of HCT, the paper's base, differ)."


def _word(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def comparable(cell: CellResult) -> bool:
    """Whether a cell was tested on the published test set, by the number of its queries."""
    dataset = DatasetName(cell.settings["data"]["dataset"])
    expected = PUBLISHED_QUERIES.get((dataset, cell.first.setting))
    return len(cell.first.query_people) == expected


def scope(cell: CellResult, seeds: Sequence[int]) -> str:
    """One sentence: what figures are means over, and of how many people and images."""
    first = cell.first
    numbers = ", ".join(map(str, seeds))
    over = (
        f"mean ± sample deviation over seeds {numbers}"
        if len(seeds) > 1
        else f"of seed {numbers} alone, hence without deviation"
    )
    trials = len(first.unmodulated.trials)
    galleries = (
        f"each the mean of {trials} trials ({first.convention} galleries)"
        if trials > 1
        else "one trial each"
    )
    return (
        f"Percent, {over}, {galleries}; {first.identities} identities, {len(first.query_people)} "
        f"queries, {first.gallery:.0f} gallery images."
    )


@dataclass(frozen=True)
class Table3:
    """Figures over the seeds whose rows are all finished.

    seeds: those seeds.
    cells: row name → its results, in the order of `seeds`.
    comparisons: paired tests of the first search.
    in_order: whether mean mAP has the paper's order: base below each module, both above all.
    """

    seeds: list[int]
    cells: dict[str, list[CellResult]]
    comparisons: list[PairedComparison]
    in_order: bool


def summarise_table3(results: Sequence[CellResult]) -> Table3 | None:
    """None while no seed has all rows."""
    by_cell = {(result.row, result.seed): result for result in results}
    seeds = whole_seeds(results, [row.name for row in ROWS])
    if not seeds:
        return None
    cells = {row.name: [by_cell[row.name, seed] for seed in seeds] for row in ROWS}
    own = {name: [result.first.own for result in of_row] for name, of_row in cells.items()}
    people = cells[BASE.name][0].first.query_people
    comparisons = [
        compare_paired(f"{one.title} − {other.title}", own[one.name], own[other.name], people)
        for one, other in COMPARED
    ]
    for row in (IAM, BOTH):
        rankings = dict(rankings_of_row(cells[row.name]))
        comparisons += [
            compare_paired(f"{row.title}: {one} − {other}", rankings[one], rankings[other], people)
            for one, other in COMPARED_WAYS
            if one in rankings and other in rankings
        ]
    in_order = all(c.map_gain > 0 for c in comparisons[: len(PAPER_ORDER)])
    return Table3(seeds, cells, comparisons, in_order)


def grids(table: Table3, recipe: Recipe) -> list[Grid]:
    """Table 3 with the published rows, the paired tests, and what shows the modules alive."""
    return [
        _figures(table, recipe),
        comparison_grid(table.comparisons),
        _module_diagnostics(table),
    ]


def table3_json(table: Table3, recipe: Recipe) -> dict[str, Any]:
    """Rows of all searches, comparisons, published rows, all cells."""
    return {
        "seeds": table.seeds,
        "base": hct_settings(recipe),
        "in_order": table.in_order,
        "rows": [
            {
                "row": row.title,
                "search": table.cells[row.name][0].searches[number].title,
                "ranking": way,
                **{
                    figure: asdict(SeedSpread.over([r.mean(figure) for r in rankings]))
                    for _, figure in FIGURE_COLUMNS
                },
            }
            for number in range(len(table.cells[BASE.name][0].searches))
            for row in ROWS
            for way, rankings in rankings_of_row(table.cells[row.name], number)
        ],
        "comparisons": [asdict(comparison) for comparison in table.comparisons],
        "published": [asdict(row) for row in published_rows(PUBLISHED)],
        "cells": [r.for_report() for of_row in table.cells.values() for r in of_row],
    }


def rankings_of_row(
    results: Sequence[CellResult], search: int = 0
) -> list[tuple[str, list[RankingResult]]]:
    """A row's rankings by name, its own first: modulated where it has IAM. One entry a seed."""
    rankings = [result.searches[search].rankings for result in results]
    return [
        (way, [of_seed[way] for of_seed in rankings])
        for way in rankings[0]
        if all(way in of_seed for of_seed in rankings)
    ]


def _figures(table: Table3, recipe: Recipe) -> Grid:
    rows: list[list[str]] = [["measured"]]
    for row in ROWS:
        title = BASE_TITLE if row is BASE else row.title
        for way, rankings in rankings_of_row(table.cells[row.name]):
            spreads = [
                SeedSpread.over([r.mean(figure) for r in rankings]) for _, figure in FIGURE_COLUMNS
            ]
            rows.append([title, way, *map(str, spreads)])
    rows.append(["published"])
    for published in published_rows(PUBLISHED):
        values = (getattr(published, figure, None) for _, figure in FIGURE_COLUMNS)
        rows.append([published.method, "", *("" if v is None else f"{v:.2f}" for v in values)])
    cell = table.cells[BASE.name][0]
    first = cell.first
    caveat = "" if comparable(cell) else f" {NOT_COMPARABLE}"
    return Grid(
        title=f"Table 3, {first.title}",
        header=["", "ranking", *(name for name, _ in FIGURE_COLUMNS)],
        rows=rows,
        notes=[
            scope(cell, table.seeds) + caveat,
            f"Published: the paper's, on the real SYSU-MM01 with ResNet-50. {hct_words(recipe)}",
            *_control_notes(table),
            "The order of the paper (base below +MAM and +IAM, both above all, by mean mAP) "
            + ("holds here." if table.in_order else "does not hold here."),
        ],
    )


def _control_notes(table: Table3) -> list[str]:
    """What the rankings are that only control rows have."""
    notes = [f"{MEAN}: every query is given the mean γ, β of all queries of the search."]
    chosen = [
        f"{row.title}, seed {result.seed}: s {s.strength:g}, c {s.centre:.3f}"
        for row in (IAM, BOTH)
        for result in table.cells[row.name]
        if (s := result.strength) is not None
    ]
    if chosen:
        notes.append(
            f"{WEAKENED}: γ' = c + s·(γ − c), β' = s·β, chosen by mAP on other people "
            f"({'; '.join(chosen)})."
        )
    return notes


def comparison_grid(comparisons: Sequence[PairedComparison]) -> Grid:
    """Paired tests as a table."""

    def points(values: Sequence[float]) -> str:
        return ", ".join(f"{100 * value:+.2f}" for value in values)

    return Grid(
        title="Paired differences",
        header=["", "mAP", "95 % interval", "mAP by seed", "rank-1 by seed"],
        rows=[
            [
                c.title,
                points([c.map_gain]),
                f"[{points([c.low, c.high])}]",
                points(c.map_gain_of_seeds),
                points(c.rank_1_gain_of_seeds),
            ]
            for c in comparisons
        ],
        notes=[
            "Points of percent, each row in its own ranking. The interval resamples the people of "
            "the queries (every query's difference of AP, averaged over seeds); how far seeds "
            "differ is in the last two columns.",
        ],
    )


def _module_diagnostics(table: Table3) -> Grid:
    rows = []
    for row in ROWS:
        if not (row.modality_alignment or row.instance_alignment):
            continue
        for result in table.cells[row.name]:
            modulation = result.first.modulation
            cells = ["", "", ""]
            if modulation is not None:
                cells = [
                    f"{modulation.gamma_mean:.3f}",
                    f"{modulation.gamma_std:.4f}",
                    f"{modulation.beta_to_feature:.3f}",
                ]
            for missing in ("rgb", "ir"):
                found = (result.compensation or {}).get(missing)
                cells.append(
                    "" if found is None else f"{100 * found.rank_1:.1f} ({100 * found.chance:.1f})"
                )
            rows.append([row.title, str(result.seed), *cells])
    return Grid(
        title="Are the modules alive?",
        header=["", "seed", "γ mean", "γ std", "‖β‖/‖y‖", "F̂ rgb", "F̂ ir"],
        rows=rows,
        notes=[
            "γ over queries: training starts at mean 1 and deviation 0, β at 0. F̂: rank-1 of "
            "compensated features among the people's real centroids of that modality (chance in "
            "parentheses).",
        ],
    )
