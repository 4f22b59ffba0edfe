"""`cmt export`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from model import load_checkpoint
from model.graphs import MODULATION
from model.outputs import folder_option
from model.terminal import Console
from training.export.export import write_export
from training.export.folder import check_output
from training.export.formats import FORMATS
from training.export.images import parity_images
from training.export.parity import TOP, Parity


class FormatChoice(StrEnum):
    """What to write."""

    ONNX = "onnx"
    OPENVINO = "openvino"
    BOTH = "both"


def export(
    checkpoint: Annotated[Path, typer.Option(help="The .safetensors file to export.")],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder of the export; an earlier one there is replaced as a whole.",
            callback=folder_option,
        ),
    ],
    formats: Annotated[
        FormatChoice, typer.Option("--format", help="What to write.")
    ] = FormatChoice.BOTH,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Crops to check the export on: rgb/<person>/… and ir/<person>/…, or a folder "
            "with a manifest.csv as in examples/. Default: examples/ of the repository."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also replace the export of another checkpoint.")
    ] = False,
) -> None:
    """Write a checkpoint as ONNX and OpenVINO files that give PyTorch's numbers without PyTorch.

    Three graphs: the embedding of visible and of infrared images, and the modulation. All are
    checked against PyTorch on real images first; where they differ, nothing is written.

    Example: cmt export --checkpoint examples/compact.safetensors --output exported
    """
    model, info = load_checkpoint(checkpoint)
    chosen = list(FORMATS.values()) if formats is FormatChoice.BOTH else [FORMATS[formats]]
    check_output(output, info.fingerprint, overwrite=overwrite)
    console = Console(soft_wrap=True)
    with console.status("Converting the network and comparing it with PyTorch"):
        pictures = parity_images(images, info.config)
        parities = write_export(model, info, chosen, pictures, output)
    console.print(_table(parities))
    written = ", ".join(sorted(path.name for path in output.iterdir()))
    console.print(f"Wrote {output}: {written}")


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
