"""`cmt calibrate`."""

from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from model import store_calibration
from model.calibration import (
    NORMALISATIONS,
    CalibrationFacts,
    CalibrationMap,
    Normalisation,
    Threshold,
)
from model.device import chosen_device
from model.outputs import Outputs, file_option, picture_option
from model.terminal import Console
from training.calibration.calibrate import FALSE_ACCEPT_RATES
from training.calibration.checkpoint import CalibrationRequest, calibrate_checkpoint
from training.calibration.curves import FITS, Method
from training.calibration.plot import plot_reliability
from training.datasets import DatasetName
from training.files import write_report
from training.options import (
    BatchSize,
    DatasetLabel,
    Device,
    FiguresFile,
    Root,
    Workers,
)


def calibrate(
    checkpoint: Annotated[Path, typer.Option(help="The .safetensors file to calibrate.")],
    dataset: Annotated[DatasetName, typer.Option(help="Layout of ROOT.")],
    root: Root,
    ids: Annotated[
        Path, typer.Option(help="List of identities that the checkpoint was not trained on.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the calibrated file goes. Default: in its place.", callback=file_option
        ),
    ] = None,
    dataset_name: DatasetLabel = None,
    prior: Annotated[
        float,
        typer.Option(
            min=0.001, max=0.999, help="Share of pairs of one person that probabilities assume."
        ),
    ] = 0.5,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write reliability diagrams here.", callback=picture_option),
    ] = None,
    json_file: FiguresFile = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
) -> None:
    """Teach a checkpoint what its distances mean: probabilities of "same person", and thresholds.

    Fitted on pairs of held-out people and stored in the checkpoint, whose weights and fingerprint
    stay as they are. docs/calibration.md says how to read them.

    Example: cmt calibrate --checkpoint run/last.safetensors --dataset sysu --root SYSU-MM01
    --ids SYSU-MM01/exp/val_id.txt --plot reliability.png
    """
    if output is None:
        file_option(checkpoint)
    request = CalibrationRequest(
        *(checkpoint, dataset, root, ids, prior),
        device=chosen_device(device),
        batch_size=batch_size,
        workers=workers,
        name=dataset_name,
    )
    console = Console(soft_wrap=True)
    with console.status(f"Reading {checkpoint} and the images of {root}") as status:
        info, fit = calibrate_checkpoint(request, progress=status.update)
    facts = fit.calibration.facts
    for modulated in (True, False):
        console.print(_table(facts, modulated))
    for line in fit.left_out:
        console.print(line)
    outputs, target = Outputs(), output or checkpoint
    with outputs.attempt(target):
        store_calibration(checkpoint, target, fit.calibration, info.fingerprint)
        console.print(f"Stored in {target}; its fingerprint is unchanged.")
    if json_file is not None:
        content = {
            "checkpoint": {"file": checkpoint.name, "fingerprint": info.fingerprint},
            "calibration": fit.to_json(),
        }
        with outputs.attempt(json_file):
            write_report(json_file, content)
    if plot is not None:
        with outputs.attempt(plot):
            plot_reliability(facts, fit.reliabilities, plot)
    outputs.finish()


def _table(facts: CalibrationFacts, modulated: bool) -> Table:
    """One column a modality pair: the forms that were compared, then what the kept one is worth."""
    maps = [m for m in facts.maps if m.modulated == modulated]
    table = Table(
        title=f"{'Modulated' if modulated else 'Unmodulated'} distance → similarity, prior "
        f"{facts.prior:g}",
        caption="log loss in nats a pair (* kept; of the prior alone "
        f"{maps[0].log_loss_of_prior:.4f}), calibration error and rates of accepts are of people "
        "held out of the fit, five halvings; accept above the similarity",
    )
    table.add_column("query → gallery", no_wrap=True)
    for m in maps:
        table.add_column(f"{m.query} → {m.gallery}", justify="right", no_wrap=True)
    for method, normalisation in product(FITS, NORMALISATIONS):
        table.add_row(
            f"log loss, {normalisation} {method}",
            *(_loss(m, normalisation, method) for m in maps),
        )
    table.add_section()
    table.add_row("pairs of one person", *(f"{m.positives:,}" for m in maps))
    table.add_row("pairs of two people", *(f"{m.negatives:,}" for m in maps))
    table.add_row("calibration error", *(f"{m.expected_calibration_error:.4f}" for m in maps))
    for place, rate in enumerate(FALSE_ACCEPT_RATES):
        thresholds = [m.thresholds[place] for m in maps]
        table.add_section()
        table.add_row(
            f"false accepts {rate:.1%}: similarity", *(_similarity(t) for t in thresholds)
        )
        table.add_row("  true accepts", *(_percent(t.true_accept_rate) for t in thresholds))
        table.add_row(
            "  false accepts, measured",
            *(_percent(t.measured_false_accept_rate) for t in thresholds),
        )
    return table


def _loss(m: CalibrationMap, normalisation: Normalisation, method: Method) -> str:
    kept = (m.normalisation, m.curve.method) == (normalisation, method)
    form = (normalisation, method)
    loss = next(c.log_loss for c in m.candidates if (c.normalisation, c.method) == form)
    return f"{loss:.4f}{'*' if kept else ' '}"


def _similarity(threshold: Threshold) -> str:
    similarity = threshold.similarity
    return "too few" if similarity is None else f"{similarity:.4f}"


def _percent(rate: float | None) -> str:
    return "too few" if rate is None else f"{100 * rate:.2f} %"
