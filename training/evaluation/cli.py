"""`cmt evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from model.device import chosen_device
from model.outputs import Outputs, folder_option, picture_option
from model.terminal import Console
from training.datasets import DatasetName
from training.evaluation.checkpoints import (
    TRIAL_FIELD,
    CheckpointEvaluation,
    EvaluationRequest,
    GalleryChoice,
    ProtocolChoice,
    ScoredCheckpoint,
    evaluate_checkpoints,
)
from training.evaluation.figures import plot_cmc, plot_reliability, write_sheets
from training.evaluation.sysu import TRIAL_FILE
from training.evaluation.tables import (
    detail_tables,
    explained_lines,
    identification_table,
    module_lines,
    open_set_lines,
    open_set_table,
    paper_tables,
    size_lines,
    way_lines,
)
from training.files import write_report
from training.options import (
    BatchSize,
    DatasetLabel,
    Device,
    FiguresFile,
    Root,
    Workers,
)

_AUTO = GalleryChoice.AUTO
CONVENTIONS = {
    DatasetName.SYSU: (_AUTO, GalleryChoice.OFFICIAL, GalleryChoice.SEEDED),
    DatasetName.LLCM: (_AUTO, GalleryChoice.SEEDED, GalleryChoice.AUTHORS),
}


def evaluate(
    dataset: Annotated[DatasetName, typer.Option(help="Layout and protocol of ROOT.")],
    root: Root,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="The .safetensors file to evaluate. RegDB's ten: 'run/{trial}.safetensors'."
        ),
    ],
    ids: Annotated[
        Path | None,
        typer.Option(help="List of identities to evaluate on instead of the protocol's test side."),
    ] = None,
    dataset_name: DatasetLabel = None,
    trial: Annotated[
        int | None,
        typer.Option(help="RegDB: only this split. Default: the checkpoint's own, or all ten."),
    ] = None,
    convention: Annotated[
        GalleryChoice,
        typer.Option(
            help=f"Galleries. SYSU-MM01: official, of {TRIAL_FILE}, or seeded draws; auto takes "
            "the official ones where the file is there. LLCM: seeded draws (auto), or what its "
            "authors' scripts compute for visible to infrared (authors)."
        ),
    ] = _AUTO,
    protocol: Annotated[
        ProtocolChoice,
        typer.Option(
            help="The data set's own, or mixed: galleries of both modalities (SYSU-MM01, LLCM)."
        ),
    ] = ProtocolChoice.OWN,
    rerank: Annotated[
        bool,
        typer.Option(
            help="Also k-reciprocal re-ranking over all queries and the gallery, as published."
        ),
    ] = False,
    mirror: Annotated[
        bool,
        typer.Option(
            help="Also without the mirror image, or with it where the checkpoint does without; "
            "embeds everything once more."
        ),
    ] = False,
    json_file: FiguresFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write CMC curves to this picture.", callback=picture_option),
    ] = None,
    reliability: Annotated[
        Path | None,
        typer.Option(
            help="Write whether probabilities came true to this picture, if the checkpoint has "
            "any.",
            callback=picture_option,
        ),
    ] = None,
    sheets: Annotated[
        Path | None,
        typer.Option(
            help="Write pictures of the best and worst queries to this folder.",
            callback=folder_option,
        ),
    ] = None,
    device: Device = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
) -> None:
    """Measure a checkpoint on identities that it was not trained on, by the dataset's protocol.

    Example: cmt evaluate --dataset sysu --root SYSU-MM01 --checkpoint run/best.safetensors
    --json result.json
    """
    if convention not in CONVENTIONS.get(dataset, (_AUTO,)):
        raise typer.BadParameter(
            f"--convention {convention} does not go with {dataset}: SYSU-MM01 has official and "
            "seeded galleries, LLCM seeded ones and those of its authors"
        )
    if protocol is ProtocolChoice.MIXED and convention not in (_AUTO, GalleryChoice.SEEDED):
        raise typer.BadParameter(
            f"--convention {convention} does not go with --protocol mixed, whose galleries are "
            "always seeded draws"
        )
    request = EvaluationRequest(
        *(dataset, root, checkpoint, ids, trial, convention, rerank, protocol, mirror),
        device=chosen_device(device),
        batch_size=batch_size,
        workers=workers,
        name=dataset_name,
    )

    outputs = Outputs()

    def scored(one: ScoredCheckpoint) -> None:
        if sheets is not None:
            folder = sheets / one.file.stem if TRIAL_FIELD in checkpoint else sheets
            for split_scores in one.scores.splits:
                with outputs.attempt(folder):
                    write_sheets(one.samples, split_scores, folder)

    console = Console(soft_wrap=True)
    found = evaluate_checkpoints(request, working=console.status, scored=scored)
    _show(console, found)
    if json_file is not None:
        with outputs.attempt(json_file):
            write_report(json_file, found.to_json())
    if plot is not None:
        with outputs.attempt(plot):
            plot_cmc(found.evaluation, plot)
    if reliability is not None:
        if found.evaluation.identification:
            with outputs.attempt(reliability):
                plot_reliability(found.evaluation, reliability)
        else:
            console.print(
                f"{reliability} is not written: without a calibration of this release a checkpoint "
                "has no probabilities; make one with cmt calibrate."
            )
    outputs.finish()


def _show(console: Console, found: CheckpointEvaluation) -> None:
    evaluation = found.evaluation
    for line in [*size_lines(evaluation), *way_lines(evaluation)]:
        console.print(line)
    console.print()
    for table in [
        *detail_tables(evaluation),
        open_set_table(evaluation),
        *paper_tables(evaluation),
    ]:
        console.print_table(table)
        console.print()
    if evaluation.identification:
        console.print_table(identification_table(evaluation, found.fitted_on))
        console.print()
    lines = (open_set_lines, explained_lines, module_lines)
    for line in (line for lines_of in lines for line in lines_of(evaluation)):
        console.print(line)
    console.print(f"Checkpoint selection: {found.checkpoints[0].selection}")
    for checkpoint in found.checkpoints:
        if people := checkpoint.calibrated_on:
            console.print(
                f"{checkpoint.file.name} was calibrated on {people} of these identities: what it "
                "chose on them (strength, score, re-ranking, probabilities) is flattered here, and "
                "open-set figures by its calibrated score are left out.",
            )
