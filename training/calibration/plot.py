"""Reliability diagrams: predicted against observed, with how many are behind it."""

from pathlib import Path
from typing import Any

import numpy as np

from training.calibration.calibrate import Fit
from training.calibration.curves import BINS, Reliability
from training.calibration.tables import way_name
from training.files import write_figure

_SAME, _DIFFERENT = "#1a6fb5", "#c0504d"


def plot_reliability(fit: Fit, path: Path) -> None:
    """Write the diagrams as .png, .svg or .pdf.

    Of every curve, modulated above and unmodulated below; then of every posterior's first answers,
    labelled above and unlabelled below.
    """
    from matplotlib.figure import Figure  # slow to import, and only here

    facts = fit.calibration.facts
    pairs = list(dict.fromkeys((m.query, m.gallery) for m in facts.maps))
    judged = fit.ranking.judged if fit.ranking is not None else []
    kinds = list(dict.fromkeys((one.fit.modulated, one.fit.reranked) for one in judged))
    columns, bands = max(len(pairs), len(kinds)), 4 if judged else 2
    figure = Figure(figsize=(3.4 * columns + 0.4, 4.6 * bands), layout="constrained")
    grid = figure.subplots(
        *(2 * bands, columns), sharex=True, squeeze=False, height_ratios=(3, 1.1) * bands
    )
    used = set()
    for chosen, diagram in zip(facts.maps, fit.reliabilities, strict=True):
        row, column = 0 if chosen.modulated else 2, pairs.index((chosen.query, chosen.gallery))
        way = "modulated" if chosen.modulated else "unmodulated"
        title = f"similarity, {chosen.query} → {chosen.gallery}, {way}"
        how = f"{chosen.normalisation}, {chosen.curve.method}"
        _diagram(grid[row, column], diagram, f"{title}\n{how}", chosen.log_loss)
        _counts(grid[row + 1, column], diagram, ("one person", "two people"))
        used |= {(row, column), (row + 1, column)}
    for one in judged:
        row = 4 if one.fit.labelled else 6
        named = "labelled" if one.fit.labelled else "unlabelled"
        column = kinds.index((one.fit.modulated, one.fit.reranked))
        title = f"probability of the first, {named}\n{way_name(one.fit)}"
        _diagram(grid[row, column], one.reliability, title, one.fit.log_loss)
        _counts(grid[row + 1, column], one.reliability, ("right", "wrong"))
        used |= {(row, column), (row + 1, column)}
    for row in range(0, 2 * bands, 2):
        share = "one person" if row < 4 else "right answers"
        grid[row, 0].set_ylabel(f"observed share of {share}")
        grid[row + 1, 0].set_ylabel("held-out pairs" if row < 4 else "searches")
    for place, panel in np.ndenumerate(grid):
        panel.set_visible(place in used)
    for panel in grid[-1]:
        panel.set_xlabel("predicted")
    for row in (1, 5)[: bands // 2]:
        grid[row, 0].legend(loc="upper center", fontsize=7, ncols=2)
    people = sum(len(one.identities) for one in facts.people)
    figure.suptitle(
        f"Reliability on people held out of the fit ({people} people); pairs weighted to a prior "
        f"of {facts.prior:g}"
    )
    write_figure(path, figure, dpi=100)


def _diagram(panel: Any, diagram: Reliability, title: str, log_loss: float) -> None:
    filled = ~np.isnan(diagram.predicted)
    panel.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    panel.plot(diagram.predicted[filled], diagram.observed[filled], "o-", color="#222222")
    panel.set_title(title, fontsize=10)
    panel.text(
        *(0.04, 0.96),
        f"log loss {log_loss:.3f}\nECE {diagram.error:.3f}",
        transform=panel.transAxes,
        verticalalignment="top",
        fontsize=8,
    )
    panel.set(xlim=(0, 1), ylim=(0, 1))
    panel.grid(alpha=0.3)


def _counts(panel: Any, diagram: Reliability, names: tuple[str, str]) -> None:
    """How many each bin holds, on a logarithmic axis."""
    centers, width = (np.arange(BINS) + 0.5) / BINS, 0.42 / BINS
    panel.bar(centers - width / 2, diagram.positives, width, color=_SAME, label=names[0])
    panel.bar(centers + width / 2, diagram.negatives, width, color=_DIFFERENT, label=names[1])
    panel.set_yscale("log")
    most = max(diagram.positives.max(), diagram.negatives.max())
    panel.set_ylim(0.8, max(panel.get_ylim()[1], 30 * most))  # room for the legend
    panel.grid(alpha=0.3, axis="y")
