"""The paper's Figure 3: rank-1 and mAP over λ, the weight of L_mod (15), and over p, the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.ablation.cells import AblationError, Cell, Start, changed_model
from training.ablation.paired import SeedSpread
from training.ablation.render import Grid
from training.ablation.report import Ablation, Summary
from training.ablation.results import (
    MODULATED,
    UNMODULATED,
    CellResult,
    RankingResult,
    whole_seeds,
)
from training.ablation.table3 import (
    BASE,
    BASE_TITLE,
    BOTH,
    FIGURE_COLUMNS,
    NOT_COMPARABLE,
    comparable,
    hct_settings,
    hct_words,
    rankings_of_row,
    row_recipe,
    scope,
)
from training.datasets import DatasetName
from training.evaluation.published import TITLES, PublishedRow, published_rows
from training.files import write_figure
from training.recipe import Recipe

# The paper prints its curves as a picture only: values and heights are in neither its text nor
# published.csv. What the text gives is the best point of each, the setting of Tables 1 and 2.
PUBLISHED_AT = {"lambda": 0.2, "parts": 6}
LAMBDAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)
MOST_PARTS = 12
PARTS_FIELD = "{parts}"


@dataclass(frozen=True)
class Point:
    """One value of what is swept: row name → the curve's title, and the recipe of each row."""

    value: float
    rows: dict[str, str]
    recipes: dict[str, Recipe]
    start: Start


@dataclass(frozen=True)
class Sweep:
    """A sweep: `figure` of the paper, `name` as on the command line, `axis` as on the plot."""

    figure: str
    name: str
    axis: str
    points: list[Point]

    def cells(self, seeds: Sequence[int]) -> list[Cell]:
        """All points of the first seed, then of the next."""
        return [
            Cell(row, seed, point.recipes[row], point.start)
            for seed in seeds
            for point in self.points
            for row in point.rows
        ]

    @property
    def row_names(self) -> list[str]:
        """The rows of all points; a seed is whole when it has a cell of each."""
        return [row for point in self.points for row in point.rows]


def sweep_lambda(recipe: Recipe, start: Start, values: Sequence[float] = LAMBDAS) -> Sweep:
    """Both modules on; λ of the last stage takes each value, and that of the others in proportion.

    Raises AblationError where the last stage has no weight of modulation.
    """
    both = row_recipe(recipe, BOTH)
    own = both.stages[-1].weights.modulation
    if not own:
        raise AblationError("the recipe's last stage has no weight of modulation to be swept")
    points = []
    for value in values:
        content = both.model_dump(mode="json")
        for stage in content["stages"]:
            stage["weights"]["modulation"] *= value / own
        row = f"lambda-{value:g}"
        points.append(Point(value, {row: "CMT"}, {row: Recipe.model_validate(content)}, start))
    return Sweep("Figure 3 (a)", "lambda", "λ (weight of the modulation loss)", points)


def sweep_parts(recipe: Recipe, start: Start, values: Sequence[int]) -> Sweep:
    """CMT and the base with p parts. A start depends on p: see `start_of_parts`.

    Raises AblationError where a feature map's height is no multiple of a value.
    """
    points = []
    for value in values:
        of_parts = changed_model(recipe, parts=value)
        rows = {
            f"parts-{value}-cmt": (BOTH, "CMT"),
            f"parts-{value}-base": (BASE, BASE_TITLE),
        }
        points.append(
            Point(
                value,
                {name: title for name, (_, title) in rows.items()},
                {name: row_recipe(of_parts, row) for name, (row, _) in rows.items()},
                start_of_parts(start, value),
            )
        )
    return Sweep("Figure 3 (b)", "parts", "p (number of parts)", points)


def start_of_parts(start: Start, parts: int) -> Start:
    """The start for p parts: pre-trained with as many, or the file with p for "{parts}"."""
    if start.checkpoint is not None:
        return Start(checkpoint=Path(str(start.checkpoint).replace(PARTS_FIELD, str(parts))))
    if start.pretraining is not None:
        recipe = changed_model(start.pretraining, parts=parts)
        return Start(pretraining=recipe, name=f"{start.name}-parts-{parts}")
    return start


def possible_parts(recipes: Sequence[Recipe]) -> list[int]:
    """Every p up to 12 that divides the height of the feature map in all stages of all recipes."""
    possible = []
    for parts in range(1, MOST_PARTS + 1):
        try:
            for recipe in recipes:
                changed_model(recipe, parts=parts)
        except AblationError:
            continue
        possible.append(parts)
    return possible


def sweep_ablation(
    sweep: Sweep,
    recipe: Recipe,
    dataset: DatasetName,
    seeds: Sequence[int],
) -> Ablation:
    """Figure 3 (a) or (b): its cells, and the curves of those that are finished."""

    def summarise(results: Sequence[CellResult]) -> Summary | None:
        found = summarise_sweep(sweep, results, dataset)
        if found is None:
            return None

        def draw(picture: Path) -> None:
            plot_sweep(sweep, found, recipe, picture)

        return Summary([grid(sweep, found, recipe)], sweep_json(sweep, found, recipe), draw)

    return Ablation(sweep.figure, recipe, sweep.cells(seeds), summarise)


@dataclass(frozen=True)
class SweepCurve:
    """One line of the plot: its title, and for each value the rankings, one per seed."""

    title: str
    values: list[float]
    rankings: list[list[RankingResult]]

    def spreads(self, figure: str) -> list[SeedSpread]:
        """Over the seeds, one per value. figure: a field of `TrialFigures`."""
        return [SeedSpread.over([r.mean(figure) for r in seeds]) for seeds in self.rankings]


@dataclass(frozen=True)
class SweepResult:
    """Curves over the seeds for which every point is finished."""

    seeds: list[int]
    curves: list[SweepCurve]
    cells: list[CellResult]
    published: PublishedRow | None


def summarise_sweep(
    sweep: Sweep, results: Sequence[CellResult], dataset: DatasetName
) -> SweepResult | None:
    """None while no seed has every point."""
    seeds = whole_seeds(results, sweep.row_names)
    if not seeds:
        return None
    by_cell = {(result.row, result.seed): result for result in results}
    lines: dict[str, tuple[list[float], list[list[RankingResult]]]] = {}
    cells: list[CellResult] = []
    for point in sweep.points:
        for row, title in point.rows.items():
            of_row = [by_cell[row, seed] for seed in seeds]
            cells += of_row
            found = [of for of in rankings_of_row(of_row) if of[0] in (MODULATED, UNMODULATED)]
            for way, rankings in found:
                name = title if len(found) == 1 else f"{title}, {way}"
                values, of_values = lines.setdefault(name, ([], []))
                values.append(point.value)
                of_values.append(rankings)
    curves = [SweepCurve(title, *line) for title, line in lines.items()]
    return SweepResult(seeds, curves, cells, _published(dataset, cells[0]))


def grid(sweep: Sweep, result: SweepResult, recipe: Recipe) -> Grid:
    """The curves as a table."""
    rows = [
        [
            curve.title,
            f"{value:g}",
            *(str(curve.spreads(figure)[place]) for _, figure in FIGURE_COLUMNS),
        ]
        for curve in result.curves
        for place, value in enumerate(curve.values)
    ]
    cell = result.cells[0]
    notes = [scope(cell, result.seeds), *captions(sweep, result, recipe)]
    if result.published is not None:
        figures = (getattr(result.published, figure, None) for _, figure in FIGURE_COLUMNS)
        rows += [
            ["published"],
            [
                "CMT",
                f"{PUBLISHED_AT[sweep.name]:g}",
                *("" if figure is None else f"{figure:.2f}" for figure in figures),
            ],
        ]
        if not comparable(cell):
            notes.append(NOT_COMPARABLE)
    return Grid(
        title=f"Figure 3, {sweep.axis}, {cell.first.title}",
        header=["", sweep.name, *(name for name, _ in FIGURE_COLUMNS)],
        rows=rows,
        notes=notes,
    )


def captions(sweep: Sweep, result: SweepResult, recipe: Recipe) -> list[str]:
    """Sentences that belong beside the curves: the published point, and the base's settings."""
    lines = []
    if (row := result.published) is not None:
        at = f"{sweep.name} {PUBLISHED_AT[sweep.name]:g}"
        lines.append(
            f"Published: CMT at {at} on the real {row.dataset} with ResNet-50, "
            f"rank-1 {row.rank_1:.2f}, mAP {row.mean_ap:.2f}."
        )
    if any(curve.title == BASE_TITLE for curve in result.curves):
        lines.append(hct_words(recipe))
    return lines


def sweep_json(sweep: Sweep, result: SweepResult, recipe: Recipe) -> dict[str, Any]:
    """Curves with their deviations, the published point, all cells."""
    return {
        "seeds": result.seeds,
        "base": hct_settings(recipe),
        "curves": [
            {
                "title": curve.title,
                sweep.name: curve.values,
                **{
                    figure: [asdict(spread) for spread in curve.spreads(figure)]
                    for _, figure in FIGURE_COLUMNS
                },
            }
            for curve in result.curves
        ],
        "published": None
        if result.published is None
        else {sweep.name: PUBLISHED_AT[sweep.name]} | asdict(result.published),
        "cells": [cell.for_report() for cell in result.cells],
    }


def plot_sweep(sweep: Sweep, result: SweepResult, recipe: Recipe, path: Path) -> None:
    """Rank-1 and mAP over the values, as .png, .svg or .pdf; bars are deviations over seeds.

    The published point is drawn where the test set is the published one, and only stated elsewhere.
    """
    from matplotlib.figure import Figure  # slow to import, and only here

    figure = Figure(figsize=(9, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    values = [point.value for point in sweep.points]
    drawn = comparable(result.cells[0]) and PUBLISHED_AT[sweep.name] in values
    for panel, (name, field) in zip(
        panels, (("rank-1", "rank_1"), ("mAP", "mean_ap")), strict=True
    ):
        for place, curve in enumerate(result.curves):
            spreads = curve.spreads(field)
            # Values differ by large factors: they are spaced evenly, and curves are offset a
            # little, so that their error bars do not overlap.
            panel.errorbar(
                [values.index(value) + 0.04 * place for value in curve.values],
                [100 * spread.mean for spread in spreads],
                yerr=[100 * (spread.std or 0) for spread in spreads],
                fmt=("o-", "s--", "^-.")[place],
                capsize=3,
                label=curve.title,
            )
        if result.published is not None and drawn:
            panel.plot(
                values.index(PUBLISHED_AT[sweep.name]),
                getattr(result.published, field),
                "*",
                color="black",
                markerfacecolor="none",
                markersize=12,
                label=f"published: CMT on the real {result.published.dataset}",
            )
        panel.set(xlabel=sweep.axis, ylabel=f"{name} [%]")
        panel.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    first = result.cells[0].first
    seeds = f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}"
    title = f"{first.title}, {first.identities} identities, {seeds}"
    figure.suptitle("\n".join([title, *captions(sweep, result, recipe)]), fontsize="small")
    write_figure(path, figure, dpi=150)


def _published(dataset: DatasetName, cell: CellResult) -> PublishedRow | None:
    title = TITLES.get(dataset)
    if title is None:
        return None
    return next(
        (
            row
            for row in published_rows(title)
            if row.method == "CMT"
            and (row.setting, row.shots) == (cell.first.setting, cell.first.shots)
        ),
        None,
    )
