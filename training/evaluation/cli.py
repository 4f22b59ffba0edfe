"""`cmt evaluate`."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from model import CheckpointInfo, load_checkpoint
from training.datasets import DatasetError, DatasetName, read_ids, read_sysu
from training.evaluation.report import evaluate_sysu, table, vitality_lines
from training.evaluation.sysu import TRIAL_FILE


def evaluate(
    dataset: Annotated[DatasetName, typer.Option(help="Layout and protocol of ROOT.")],
    root: Annotated[Path, typer.Option(help="Folder of the dataset.")],
    checkpoint: Annotated[Path, typer.Option(help="The .safetensors file to evaluate.")],
    ids: Annotated[
        Path | None,
        typer.Option(help="Identities to evaluate on; ROOT/exp/test_id.txt if not given."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
) -> None:
    """Measure a checkpoint on identities that it was not trained on.

    Example: cmt evaluate --dataset sysu --root SYSU-MM01 --checkpoint run/best.safetensors
    --json result.json
    """
    identities = read_ids(ids or root / "exp" / "test_id.txt")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, info = load_checkpoint(checkpoint, device)
    refuse_training_identities(info, dataset, identities)
    samples = read_sysu(root, identities)
    trial_file = root / TRIAL_FILE
    console = Console(soft_wrap=True)
    with console.status(f"Embedding {len(samples)} images on {device}"):
        evaluation = evaluate_sysu(
            model, samples, trial_file=trial_file, batch_size=batch_size, workers=workers
        )
    drawn = f"from {trial_file}" if evaluation.trials == "official" else f"no {trial_file}"
    console.print(f"Galleries: {evaluation.trials} trials ({drawn}).", highlight=False)
    console.print(table(evaluation))
    for line in vitality_lines(evaluation):
        console.print(line, highlight=False)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        content = {"checkpoint": {"file": checkpoint.name, "fingerprint": info.fingerprint}}
        json_file.write_text(json.dumps(content | evaluation.to_json(), indent=2) + "\n")


def refuse_training_identities(info: CheckpointInfo, dataset: str, identities: list[int]) -> None:
    """Figures on people that a network was trained on say nothing about others.

    Raises:
        DatasetError: the checkpoint was trained on some of the identities, by its own record.
    """
    if info.training.get("dataset") != dataset:
        return
    known = sorted(set(identities) & {int(i) for i in info.training.get("identities", [])})
    if known:
        raise DatasetError(
            f"The checkpoint was trained on {len(known)} of these {len(identities)} identities "
            f"({', '.join(map(str, known[:5]))}{', …' if len(known) > 5 else ''}); choose others "
            "with --ids."
        )
