"""A table or figure of the paper as cells to train, and the report on the finished ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.machine import machine
from training.ablation.cells import AblationData, Cell
from training.ablation.render import Grid, markdown
from training.ablation.results import CellResult
from training.recipe import Recipe


@dataclass(frozen=True)
class Summary:
    """What the whole seeds among finished cells say: tables, and the same as plain values.

    draw: writes them as a picture, where there is one.
    """

    grids: list[Grid]
    content: dict[str, Any]
    draw: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Report:
    """What an ablation says as far as it is finished.

    title: a heading. lines: what was trained and tested, a sentence each. grids: the tables.
    content: everything as plain values, every cell's figures among them. draw: see `Summary`.
    """

    title: str
    lines: list[str]
    grids: list[Grid]
    content: dict[str, Any]
    draw: Callable[[Path], None] | None

    def markdown(self) -> str:
        """Heading, lines and tables as a Markdown document."""
        return markdown(self.title, self.lines, self.grids)


@dataclass(frozen=True)
class Ablation:
    """One table or figure.

    name: as the paper has it, "Table 3". recipe: what all cells are variations of.
    summarise: finished cells → what they say, None while no seed has all of its cells.
    """

    name: str
    recipe: Recipe
    cells: Sequence[Cell]
    summarise: Callable[[Sequence[CellResult]], Summary | None]

    def report(self, results: Sequence[CellResult], data: AblationData) -> Report | None:
        """The report on the cells that are finished; None while no seed has all of its cells."""
        summary = self.summarise(results)
        if summary is None:
            return None
        pretraining = self.cells[0].start.pretraining
        facts = {
            "ablation": self.name,
            "complete": len(results) == len(self.cells),
            "recipe": self.recipe.model_dump(mode="json"),
            "pretraining": pretraining and pretraining.model_dump(mode="json"),
            "data": data.facts,
            "machine": machine(),
        }
        return Report(
            title=f"Ablation: {self.name}",
            lines=facts_lines(results, data),
            grids=summary.grids,
            content=facts | summary.content,
            draw=summary.draw,
        )


def facts_lines(results: Sequence[CellResult], data: AblationData) -> list[str]:
    """What was trained and tested, for how long and where, one sentence each."""
    sides = [
        f"{facts['identities']:,} identities ({facts['images']:,} images of "
        f"{', '.join(facts['folders'])})"
        for facts in (data.facts["training"], data.facts["test"])
    ]
    steps = sorted({result.steps for result in results})
    seconds = sorted({f"{result.seconds:.0f}" for result in results}, key=int)
    machines = {str(r.machine["gpu"] or r.machine["cpu"]) for r in results}
    starts = {_start_in_words(result.settings["start"]) for result in results}
    return [
        f"Trained on {sides[0]}, tested on {sides[1]}.",
        f"Every cell: {' or '.join(map(str, steps))} steps from {', '.join(sorted(starts))}; "
        f"{' to '.join(dict.fromkeys((seconds[0], seconds[-1])))} s each, on "
        f"{', '.join(sorted(machines))}.",
    ]


def _start_in_words(facts: dict[str, Any]) -> str:
    """A start by its name and the beginning of its fingerprint."""
    name = next(facts[kind] for kind in ("checkpoint", "pretraining", "weights") if kind in facts)
    fingerprint = facts.get("fingerprint")
    return name if fingerprint is None else f"{name} ({fingerprint[:12]})"
