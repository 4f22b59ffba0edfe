"""The reliability diagram of every curve: predicted against observed, with the pairs behind it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.calibration import CalibrationFacts, CalibrationMap
from training.calibration.curves import BINS, Reliability
from training.files import write_figure

_SAME, _DIFFERENT = "#1a6fb5", "#c0504d"


def plot_reliability(
    facts: CalibrationFacts, reliabilities: Sequence[Reliability], path: Path
) -> None:
    """Write one panel a curve as .png, .svg or .pdf: modulated above, unmodulated below."""
    from matplotlib.figure import Figure  # slow to import, and only here

    pairs = list(dict.fromkeys((m.query, m.gallery) for m in facts.maps))
    figure = Figure(figsize=(3.4 * len(pairs) + 0.4, 9.2), layout="constrained")
    grid = figure.subplots(
        4, len(pairs), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1.1, 3, 1.1)
    )
    for chosen, diagram in zip(facts.maps, reliabilities, strict=True):
        row, column = 0 if chosen.modulated else 2, pairs.index((chosen.query, chosen.gallery))
        _diagram(grid[row, column], chosen, diagram)
        _counts(grid[row + 1, column], diagram)
    for row in (0, 2):
        grid[row, 0].set_ylabel("observed share of one person")
        grid[row + 1, 0].set_ylabel("held-out pairs")
    for panel in grid[-1]:
        panel.set_xlabel("predicted similarity")
    grid[1, 0].legend(loc="upper center", fontsize=7, ncols=2)
    figure.suptitle(
        f"Reliability on people held out of the fit (five halvings of {len(facts.identities)} "
        f"people of {facts.dataset}); pairs weighted to a prior of {facts.prior:g}"
    )
    write_figure(path, figure, dpi=130)


def _diagram(panel: Any, chosen: CalibrationMap, diagram: Reliability) -> None:
    filled = ~np.isnan(diagram.predicted)
    panel.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    panel.plot(diagram.predicted[filled], diagram.observed[filled], "o-", color="#222222")
    way = "modulated" if chosen.modulated else "unmodulated"
    panel.set_title(
        f"{chosen.query} → {chosen.gallery}, {way}\n{chosen.normalisation}, {chosen.curve.method}",
        fontsize=10,
    )
    panel.text(
        *(0.04, 0.96),
        f"log loss {chosen.log_loss:.3f}\nECE {chosen.expected_calibration_error:.3f}",
        transform=panel.transAxes,
        verticalalignment="top",
        fontsize=8,
    )
    panel.set(xlim=(0, 1), ylim=(0, 1))
    panel.grid(alpha=0.3)


def _counts(panel: Any, diagram: Reliability) -> None:
    """How many pairs each bin holds, on a logarithmic axis."""
    centers, width = (np.arange(BINS) + 0.5) / BINS, 0.42 / BINS
    panel.bar(centers - width / 2, diagram.positives, width, color=_SAME, label="one person")
    panel.bar(centers + width / 2, diagram.negatives, width, color=_DIFFERENT, label="two people")
    panel.set_yscale("log")
    most = max(diagram.positives.max(), diagram.negatives.max())
    panel.set_ylim(0.8, max(panel.get_ylim()[1], 30 * most))  # room for the legend
    panel.grid(alpha=0.3, axis="y")
