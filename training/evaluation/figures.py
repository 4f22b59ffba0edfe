"""Pictures of an evaluation: CMC curves, and sheets of the best and worst queries."""

from collections.abc import Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from training.datasets import DatasetError, Sample
from training.datasets.decoding import UnreadableImageError, decode
from training.evaluation.report import CMC_LENGTH, Evaluation
from training.evaluation.scoring import SplitScores
from training.evaluation.ways import NAMES
from training.files import write_figure, write_file

THUMBNAIL = (72, 176)  # width, height in pixels
BORDER = 4
CAPTION = 14
STYLES = ("-", "--", "-.", ":")
RIGHT, WRONG, QUERY = "#1a9850", "#d73027", "#555555"


def plot_cmc(evaluation: Evaluation, path: Path) -> None:
    """Write the CMC curves of every search, mean over trials, as .png, .svg or .pdf."""
    from matplotlib.figure import Figure  # slow to import, and only here

    figure = Figure(figsize=(4.2 * len(evaluation.splits), 3.8), layout="constrained")
    panels = figure.subplots(1, len(evaluation.splits), sharey=True, squeeze=False)[0]
    ranks = np.arange(1, CMC_LENGTH + 1)
    for panel, split in zip(panels, evaluation.splits, strict=True):
        for (way, ranking), style in zip(split.rankings.items(), cycle(STYLES), strict=False):
            panel.plot(ranks, 100 * np.array(ranking.cmc), style, label=NAMES[way])
        panel.set(title=split.title, xlabel="rank", xticks=[1, 5, 10, 15, 20])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("queries found [%]")
    panels[-1].legend(loc="lower right")
    figure.suptitle(f"CMC, {evaluation.dataset}, {evaluation.metric} distance")
    write_figure(path, figure, dpi=150)


def plot_reliability(evaluation: Evaluation, path: Path) -> None:
    """Write predicted against observed for the first answer of every kind of gallery.

    The area of a dot grows with its searches; bins without any have none.
    """
    from matplotlib.figure import Figure

    kinds = evaluation.identification
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(2.9 * columns, 3.0 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, kind in zip(panels, kinds, strict=False):
        filled = [b for b in kind.bins if b.searches]
        predicted, observed = [b.predicted for b in filled], [b.observed for b in filled]
        panel.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
        panel.plot(predicted, observed, color="#1a6fb5", linewidth=1)
        sizes = [4 + 200 * b.searches / kind.searches for b in filled]
        panel.scatter(predicted, observed, s=sizes, color="#1a6fb5", alpha=0.7)
        panel.set(title=kind.title, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        panel.title.set_fontsize(9)
        panel.text(
            *(0.04, 0.96, f"ECE {kind.calibration_error:.3f}\nBrier {kind.brier:.3f}"),
            transform=panel.transAxes,
            verticalalignment="top",
            fontsize=8,
        )
        panel.grid(alpha=0.3)
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    for place, panel in enumerate(panels[: len(kinds)]):
        if place % columns == 0:
            panel.set_ylabel("observed: the first is right")
        if place + columns >= len(kinds):
            panel.set_xlabel("predicted probability")
    figure.suptitle(
        f"Probability of the first answer, {evaluation.dataset}, half of the people not enrolled"
    )
    write_figure(path, figure, dpi=130)


def write_sheets(
    samples: Sequence[Sample], scores: SplitScores, folder: Path, *, count: int = 10
) -> list[Path]:
    """Write the queries of highest and of lowest average precision, one picture a query.

    Each shows the query and its nearest gallery images in the first trial, ranked with modulation;
    green frames are of the same person. Files are named by search, place and query person.

    Returns the files, best first, then worst first.
    """
    trial = scores.compared[0][0]
    answerable = np.flatnonzero(trial.answerable)
    by_precision = answerable[np.argsort(-trial.average_precision[answerable], kind="stable")]
    count = min(count, by_precision.size // 2 or 1)
    written = []
    for kind, rows in (("best", by_precision[:count]), ("worst", by_precision[::-1][:count])):
        for place, row in enumerate(rows, 1):
            query = samples[scores.split.queries[row]]
            sheet = _sheet(
                query,
                [samples[i] for i in scores.nearest[row]],
                f"average precision {trial.average_precision[row]:.3f}, first at rank "
                f"{trial.first_rank[row]}",
            )
            name = scores.split.title.replace(" ", "_")
            written.append(folder / f"{name}_{kind}_{place:02d}_person_{query.person_id}.png")
            picture = BytesIO()
            sheet.save(picture, "PNG")
            write_file(written[-1], picture.getvalue())
    return written


def _sheet(query: Sample, nearest: Sequence[Sample], caption: str) -> Image.Image:
    """Query on the left, a gap, the ranking from left to right; under each its person, camera."""
    width, height = THUMBNAIL[0] + 2 * BORDER, THUMBNAIL[1] + 2 * BORDER
    gap = width // 4
    size = (width * (1 + len(nearest)) + gap, height + 2 * CAPTION)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((BORDER, 0), caption, fill="black")
    shown = [(query, QUERY, 0)] + [
        (sample, RIGHT if sample.person_id == query.person_id else WRONG, gap + width * place)
        for place, sample in enumerate(nearest, 1)
    ]
    for sample, colour, left in shown:
        draw.rectangle((left, CAPTION, left + width - 1, CAPTION + height - 1), fill=colour)
        sheet.paste(_thumbnail(sample), (left + BORDER, CAPTION + BORDER))
        label = f"{sample.person_id} cam{sample.camera}"
        draw.text((left + BORDER, CAPTION + height), label, fill=colour)
    return sheet


def _thumbnail(sample: Sample) -> Image.Image:
    try:
        picture = decode(sample.path, sample.modality)
    except UnreadableImageError as error:
        raise DatasetError(f"{sample.path} cannot be decoded ({error}) any more.") from error
    return picture.resize(THUMBNAIL, Image.Resampling.BILINEAR)
