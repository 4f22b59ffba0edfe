"""`cmt evaluate`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from model import load_checkpoint
from training.datasets import LAYOUTS, DatasetError, DatasetName
from training.device import chosen_device
from training.evaluation.checkpoints import (
    TRIAL_FIELD,
    Convention,
    calibrated_on,
    checkpoint_files,
    refuse_training_identities,
    selection_of,
    trial_file_of,
)
from training.evaluation.figures import plot_cmc, write_sheets
from training.evaluation.protocols import protocol_splits
from training.evaluation.report import Evaluation, score_model, summarise
from training.evaluation.sysu import TRIAL_FILE
from training.evaluation.tables import (
    detail_tables,
    open_set_lines,
    open_set_table,
    paper_tables,
    size_lines,
    vitality_lines,
)

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def evaluate(
    dataset: Annotated[DatasetName, typer.Option(help="Layout and protocol of ROOT.")],
    root: Annotated[Path, typer.Option(help="Folder of the dataset.")],
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
    trial: Annotated[
        int | None,
        typer.Option(help="RegDB: only this split. Default: the checkpoint's own, or all ten."),
    ] = None,
    convention: Annotated[
        Convention,
        typer.Option(
            help=f"SYSU-MM01's galleries: the official ones of {TRIAL_FILE}, or seeded draws; auto "
            "takes the official ones where the file is there."
        ),
    ] = Convention.AUTO,
    rerank: Annotated[
        bool, typer.Option(help="Also k-reciprocal re-ranking, in rows of its own.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write CMC curves to this picture.")] = None,
    sheets: Annotated[
        Path | None,
        typer.Option(help="Write pictures of the best and worst queries to this folder."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
) -> None:
    """Measure a checkpoint on identities that it was not trained on, by the dataset's protocol.

    Example: cmt evaluate --dataset sysu --root SYSU-MM01 --checkpoint run/best.safetensors
    --json result.json
    """
    device = chosen_device(device)
    if plot is not None and plot.suffix not in PLOT_SUFFIXES:  # before minutes of embedding
        raise typer.BadParameter(f"{plot} ends in none of {', '.join(PLOT_SUFFIXES)}")
    if convention is not Convention.AUTO and dataset is not DatasetName.SYSU:
        raise typer.BadParameter(f"only SYSU-MM01 has a choice of galleries, {dataset} has none")
    layout = LAYOUTS[dataset]
    wanted = None if ids is None else layout.read_ids(ids)
    trial_file = trial_file_of(root, convention) if dataset is DatasetName.SYSU else None
    console = Console(soft_wrap=True)
    scores = []
    checkpoints: list[dict[str, Any]] = []
    for number, file in checkpoint_files(dataset, checkpoint, trial):
        model, info = load_checkpoint(file, device)
        if number is None:  # a checkpoint of RegDB says which split it is of
            number = int(info.training.get("trial", 1)) if layout.trials > 1 else 1
        samples = layout.test(root, number, wanted)
        identities = sorted({sample.person_id for sample in samples})
        refuse_training_identities(info, dataset, identities)
        if checkpoints and selection_of(info) != checkpoints[0]["selection"]:
            raise DatasetError(
                f"{file} was selected by '{selection_of(info)}' and {checkpoints[0]['file']} by "
                f"'{checkpoints[0]['selection']}': one table never mixes the two; train all trials "
                "with the same --selection"
            )
        splits = protocol_splits(dataset, samples, trial_file=trial_file)
        shared = calibrated_on(info, dataset, identities)
        with console.status(f"Embedding {len(samples)} images on {device}"):
            scores.append(
                score_model(
                    *(model, samples, splits),
                    calibration=None if shared else info.calibration,
                    rerank=rerank,
                    batch_size=batch_size,
                    workers=workers,
                )
            )
        entry: dict[str, Any] = {
            "file": file.name,
            "fingerprint": info.fingerprint,
            "selection": selection_of(info),
        }
        entry |= {} if shared is None else {"calibrated_on_evaluated": shared}
        checkpoints.append(entry | ({"trial": number} if layout.trials > 1 else {}))
        if sheets is not None:
            folder = sheets / file.stem if TRIAL_FIELD in checkpoint else sheets
            for split_scores in scores[-1].splits:
                write_sheets(samples, split_scores, folder)
    evaluation = summarise(dataset, scores)
    _show(console, evaluation)
    console.print(f"Checkpoint selection: {checkpoints[0]['selection']}", highlight=False)
    for entry in checkpoints:
        if people := entry.get("calibrated_on_evaluated"):
            console.print(
                f"{entry['file']} was calibrated on {people} of these identities: open-set figures "
                "by its calibrated score would be flattered, and are left out.",
                highlight=False,
            )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        content = {"checkpoints": checkpoints} | evaluation.to_json()
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        plot_cmc(evaluation, plot)


def _show(console: Console, evaluation: Evaluation) -> None:
    for line in size_lines(evaluation):
        console.print(line, highlight=False)
    for table in [
        *detail_tables(evaluation),
        open_set_table(evaluation),
        *paper_tables(evaluation),
    ]:
        console.print(table)
    for line in [*open_set_lines(evaluation), *vitality_lines(evaluation)]:
        console.print(line, highlight=False, markup=False)
