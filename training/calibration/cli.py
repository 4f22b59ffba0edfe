"""`cmt calibrate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from model import store_calibration
from model.device import chosen_device
from model.outputs import Outputs, file_option, picture_option
from model.terminal import Console
from training.calibration.checkpoint import (
    CalibrationRequest,
    PeopleList,
    calibrate_checkpoint,
)
from training.calibration.plot import plot_reliability
from training.calibration.tables import tables
from training.datasets import DatasetName
from training.files import write_report
from training.options import BatchSize, Device, FiguresFile, Workers, dataset_label


def _labels(names: list[str] | None) -> list[str]:
    return [label for name in names or [] if (label := dataset_label(name)) is not None]


def calibrate(
    checkpoint: Annotated[Path, typer.Option(help="The .safetensors file to calibrate.")],
    dataset: Annotated[DatasetName, typer.Option(help="Layout of every ROOT.")],
    root: Annotated[list[Path], typer.Option(help="Folder of a set; repeat it for more sets.")],
    ids: Annotated[
        list[Path],
        typer.Option(
            help="List of identities of ROOT that the checkpoint was not trained on; one for each "
            "ROOT, in the same order."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the calibrated file goes. Default: in its place.", callback=file_option
        ),
    ] = None,
    dataset_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            callback=_labels,
            help="Name of the data set, or one for each ROOT: in two sets of one name, a number is "
            "the same person. Default: the layout's, and none for a folder of your own images.",
        ),
    ] = None,
    prior: Annotated[
        float,
        typer.Option(
            min=0.001, max=0.999, help="Share of pairs of one person that similarities assume."
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
    """Teach a checkpoint to rank people it was not trained on, and to say how probable it is right.

    Chosen on held-out people, of several sets at best: how far the modulation is followed, what
    re-ranking does, and what distances and scores mean. Stored in the checkpoint, whose weights and
    fingerprint stay as they are. docs/calibration.md says how to read it.

    Example: cmt calibrate --checkpoint run/last.safetensors --dataset sysu --root SYSU-MM01
    --ids SYSU-MM01/exp/val_id.txt --plot reliability.png
    """
    if output is None:
        file_option(checkpoint)
    request = CalibrationRequest(
        *(checkpoint, dataset, _sets(root, ids, dataset_name or []), prior),
        device=chosen_device(device),
        batch_size=batch_size,
        workers=workers,
    )
    console = Console(soft_wrap=True)
    with console.status(f"Reading {checkpoint} and the images of its sets") as status:
        info, fit = calibrate_checkpoint(request, progress=status.update)
    for table in tables(fit):
        console.print(table)
        console.print()
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
            plot_reliability(fit, plot)
    outputs.finish()


def _sets(roots: Sequence[Path], ids: Sequence[Path], names: Sequence[str]) -> list[PeopleList]:
    """Roots and lists in pairs; a single name is that of all."""
    if len(ids) != len(roots):
        raise typer.BadParameter(
            f"there are {len(roots)} roots and {len(ids)} lists; give --ids once for each --root, "
            "in the same order"
        )
    if len(names) not in (0, 1, len(roots)):
        raise typer.BadParameter(
            f"there are {len(roots)} roots and {len(names)} names; give --dataset-name once, or "
            "once for each --root"
        )
    of_each = names if len(names) == len(roots) else [*names, None][:1] * len(roots)
    return [PeopleList(*one) for one in zip(roots, ids, of_each, strict=True)]
