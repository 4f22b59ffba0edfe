"""What a run measures as it goes: metrics.jsonl, TensorBoard's files, and curves.png at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from model.atomic_file import write_whole
from training.files import write_figure
from training.state import writing

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
TENSORBOARD_FOLDER = "tensorboard"
VALIDATION = "validation_"

Record = dict[str, float]


class RunLog:
    """Lines of {"step": …, name: value}, one for each logged step and each validation.

    Lines beyond `step`, which an interrupted run wrote after its last saved state, are removed: the
    resumed run writes them again.
    """

    def __init__(self, folder: Path, step: int, *, written: bool = True) -> None:
        """step: of the last saved state. written: False in processes that are not the first."""
        self._folder = folder
        self._path = folder / METRICS_FILE
        self._board: Any = None
        if not written:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        with writing(folder):
            _truncate(self._path, step)
            self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line for `step`. Raises TrainingError where the folder cannot be written."""
        if self._board is None:
            return
        with writing(self._folder):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                kind = "validation" if name.startswith(VALIDATION) else "training"
                tag = f"{kind}/{name.removeprefix(VALIDATION)}"
                self._board.add_scalar(tag, value, step)
            self._board.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[Record]:
    """The records of metrics.jsonl in their order; none where there is no such file."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # the end of a line that a kill cut off
            continue
    return records


def last_values(records: Sequence[Record], names: Sequence[str], share: float = 0.1) -> Record:
    """Means of `names` over the last `share` of the steps, of those that have been recorded."""
    if not records:
        return {}
    start = records[-1]["step"] * (1 - share)
    means = {}
    for name in names:
        found = [record[name] for record in records if record["step"] >= start and name in record]
        if found:
            means[name] = sum(found) / len(found)
    return means


def plot_curves(folder: Path) -> None:
    """Draw metrics.jsonl as curves.png: losses, learning rate, validation, γ.

    Raises TrainingError where the folder cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import, and only here

    records = read_metrics(folder)
    figure = Figure(figsize=(11, 7), layout="constrained")
    (losses, rate), (validation, gamma) = figure.subplots(2, 2, sharex=True)

    def draw(panel: Any, name: str, scale: float = 1.0, **style: Any) -> None:
        points = [(record["step"], scale * record[name]) for record in records if name in record]
        if points:
            panel.plot(*zip(*points, strict=True), **({"label": name, "linewidth": 1} | style))

    for name in ("loss", "identity", "triplet", "triplet_parts", "consistency", "modulation"):
        draw(losses, name)
    losses.set(title="the loss, and its terms before their weights", yscale="log")
    draw(rate, "lr")
    rate.set(title="learning rate", yscale="log")
    for name, label in (("rank_1", "rank-1"), ("map", "mAP")):
        draw(validation, f"{VALIDATION}{name}", 100, label=label, marker="o", markersize=3)
    validation.set(title="held-out identities", xlabel="step", ylabel="%")
    draw(gamma, "gamma_mean", label="mean of γ", color="tab:purple")
    draw(gamma, "gamma_std", label="deviation of γ over queries", color="tab:olive")
    gamma.set(title="modulation", xlabel="step")
    for panel in (losses, rate, validation, gamma):
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(loc="best", fontsize="small")
        else:
            panel.set_yticks([])
            panel.text(0.5, 0.5, "none in this run", ha="center", transform=panel.transAxes)
    with writing(folder):
        write_figure(folder / CURVES_FILE, figure, dpi=120)


def _truncate(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`."""
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
