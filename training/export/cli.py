"""`cmt export`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from model import CheckpointInfo, load_checkpoint
from model.graphs import MODULATION
from model.int8 import DESCRIPTION_FILE as INT8_FILE
from model.int8 import int8_folder
from model.outputs import folder_option
from model.terminal import Console
from training.datasets import LAYOUTS, DatasetName
from training.evaluation.protocols import protocol_splits
from training.evaluation.sysu import TRIAL_FILE
from training.export.export import write_export
from training.export.folder import check_output
from training.export.formats import FORMATS
from training.export.images import chosen_images, parity_images
from training.export.int8 import MOST, HeldOut, Verdict, require_nncf, write_int8
from training.export.parity import TOP, Parity
from training.learnt import refuse_known_people
from training.options import DatasetLabel


class FormatChoice(StrEnum):
    """What to write."""

    ONNX = "onnx"
    OPENVINO = "openvino"
    BOTH = "both"
    INT8 = "int8"


def export(
    checkpoint: Annotated[Path, typer.Option(help="The .safetensors file to export.")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the export; an earlier one there is replaced as a whole. Default, of "
            "int8 only: beside the checkpoint, where a service looks for it.",
            callback=folder_option,
        ),
    ] = None,
    formats: Annotated[
        FormatChoice, typer.Option("--format", help="What to write.")
    ] = FormatChoice.BOTH,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Crops to check the export on, and to quantise by: rgb/<person>/… and "
            "ir/<person>/…, or a folder with a manifest.csv as in examples/. Default: examples/ of "
            "the repository."
        ),
    ] = None,
    dataset: Annotated[
        DatasetName | None, typer.Option(help="Layout of ROOT, with --format int8.")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            help="With --format int8: people whom the network does not know, to compare rankings "
            "on; without them a service takes int8 only where it is told to."
        ),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(help="List of identities of ROOT instead of the protocol's test side."),
    ] = None,
    dataset_name: DatasetLabel = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also replace the export of another checkpoint.")
    ] = False,
) -> None:
    """Write a checkpoint as ONNX and OpenVINO files that give PyTorch's numbers without PyTorch.

    Three graphs: the embedding of visible and of infrared images, and the modulation. All are
    checked against PyTorch on real images first; where they differ, nothing is written.
    With --format int8: what a service on a CPU can use for speed, see docs/export.md.

    Example: cmt export --checkpoint examples/compact.safetensors --output exported
    """
    model, info = load_checkpoint(checkpoint)
    if (dataset is None) != (root is None):
        raise typer.BadParameter("--dataset and --root go together: give both, or neither")
    if formats is FormatChoice.INT8:
        require_nncf()
        output = output or int8_folder(checkpoint)
        check_output(output, info.fingerprint, overwrite=overwrite, description_file=INT8_FILE)
        held_out = None
        if dataset is not None and root is not None:
            held_out = _held_out(info, dataset, root, ids, dataset_name)
        verdict = write_int8(model, info, chosen_images(images, MOST), output, held_out)
        _say(Console(soft_wrap=True), verdict, output)
        return
    if root is not None or ids is not None:
        raise typer.BadParameter("--dataset, --root and --ids go with --format int8 only")
    if output is None:
        raise typer.BadParameter("--output FOLDER is missing; only --format int8 has a default")
    chosen = list(FORMATS.values()) if formats is FormatChoice.BOTH else [FORMATS[formats]]
    check_output(output, info.fingerprint, overwrite=overwrite)
    console = Console(soft_wrap=True)
    with console.status("Converting the network and comparing it with PyTorch"):
        pictures = parity_images(images, info.config)
        parities = write_export(model, info, chosen, pictures, output)
    console.print(_table(parities))
    written = ", ".join(sorted(path.name for path in output.iterdir()))
    console.print(f"Wrote {output}: {written}")


def _held_out(
    info: CheckpointInfo, dataset: DatasetName, root: Path, ids: Path | None, name: str | None
) -> HeldOut:
    layout = LAYOUTS[dataset]
    trial = (info.facts.trial or 1) if layout.trials > 1 else 1
    samples = layout.test(root, trial, None if ids is None else layout.read_ids(ids))
    refuse_known_people(info, samples, dataset, name)
    splits = protocol_splits(
        dataset,
        samples,
        trial_file=root / TRIAL_FILE if dataset is DatasetName.SYSU else None,
    )
    return HeldOut(f"{dataset} {root.name}", samples, splits)


def _say(console: Console, verdict: Verdict, output: Path) -> None:
    cosines = ", ".join(f"{of} {cosine:.4f}" for of, cosine in verdict.cosines.items())
    console.print(f"Lowest cosine with PyTorch's features: {cosines} ({verdict.method}).")
    if verdict.ranked is None:
        console.print(
            "Nothing was ranked: a service takes this with runtime int8 only. With --dataset and "
            "--root of people whom the network does not know, it may choose it by itself."
        )
    else:
        table = Table(title="People whom the network does not know, fp32 and int8")
        for column in ("search", "rank-1", "", "mAP", ""):
            table.add_column(column, justify="left" if column == "search" else "right")
        for search in verdict.ranked:
            figures = (f"{100 * value:.2f}" for value in (*search.rank_1, *search.mean_ap))
            table.add_row(search.search, *figures)
        console.print(table)
    console.print(f"Wrote {output}")


def _table(parities: Sequence[Parity]) -> Table:
    """A line for each format and batch size; an embedding is named by its modality."""
    ranking = parities[0].rankings[0]
    table = Table(
        title="Largest differences from PyTorch",
        caption=f"top {TOP}: share of {ranking.queries} infrared queries whose {TOP} nearest of "
        f"{ranking.gallery} visible images, modulated, are PyTorch's",
    )
    first = [output for output in parities[0].outputs if output.batch == ranking.batch]
    names = [(output.graph, output.output) for output in first]
    table.add_column("format")
    table.add_column("batch", justify="right")
    for graph, output in names:
        name = output if graph == MODULATION else graph.removeprefix(f"{output}-")
        table.add_column(name, justify="right")
    for column in (Text("lowest\ncosine"), f"top {TOP}"):
        table.add_column(column, justify="right")
    for parity in parities:
        for ranking in parity.rankings:
            rows = [output for output in parity.outputs if output.batch == ranking.batch]
            table.add_row(
                *(parity.format, str(ranking.batch)),
                *(f"{row.max_error:.1e}" for row in rows),
                f"{min(row.min_cosine for row in rows):.6f}",
                f"{ranking.same_top10:.0%}",
            )
        table.add_section()
    return table
