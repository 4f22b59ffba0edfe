"""The network of a benchmark: a checkpoint, or an untrained backbone of the paper's size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from model import CMT, CMTConfig, save_checkpoint

Backbone = Literal["resnet18", "resnet34", "resnet50"]

Weights = Annotated[Path, typer.Option("--checkpoint", help="What embeds the crops.")]
NetworkOption = Annotated[
    Backbone | None,
    typer.Option(help="Not a checkpoint: this backbone at 384×144 with random weights."),
]


def named(checkpoint: Path, network: Backbone | None) -> dict[str, str]:
    """The option that applies, as settings of a result."""
    return {"network": network} if network else {"checkpoint": str(checkpoint)}


@contextmanager
def checkpoint_of(checkpoint: Path, network: Backbone | None) -> Iterator[Path]:
    """The checkpoint, or one of the network with random weights, for measuring time only."""
    if network is None:
        yield checkpoint
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        save_checkpoint(path, CMT(CMTConfig(backbone=network)))
        yield path
