"""Options that several commands of this package share, and the checks of what they are given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from model.device import DEVICES
from model.labels import LabelError, normalized_label
from model.outputs import file_option
from training.acceleration import Switch


def dataset_label(text: str | None) -> str | None:
    """A name as it is kept. Raises BadParameter for one that is no label."""
    try:
        return None if text is None else normalized_label(text)
    except LabelError as error:
        raise typer.BadParameter(str(error)) from error


Root = Annotated[Path, typer.Option(help="Folder of the dataset.")]
DatasetLabel = Annotated[
    str | None,
    typer.Option(
        "--dataset-name",
        metavar="NAME",
        callback=dataset_label,
        help="Name of the data set: in two sets of one name, a number is the same person. Default: "
        "the layout's, and none for a folder of your own images, where only files tell.",
    ),
]
ChannelsLast = Annotated[Switch, typer.Option(help="Memory format; auto takes the faster one.")]
Compile = Annotated[
    Switch,
    typer.Option(help="torch.compile; auto tries it in runs that are long enough to gain."),
]
Trial = Annotated[int, typer.Option(help="RegDB: which of the ten splits.")]
Device = Annotated[str, typer.Option(help=f"{DEVICES}.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]
FiguresFile = Annotated[
    Path | None,
    typer.Option("--json", help="Write the figures to this file.", callback=file_option),
]

T = TypeVar("T")


def fields_as_options(command: Callable[[T], None]) -> Callable[..., None]:
    """Decorate a command whose one parameter is a dataclass: each of its fields is an option.

    Typer reads options from a function's parameters and knows no groups of them. Commands that
    have many options in common inherit them from one dataclass instead.
    """
    (asked,) = inspect.signature(command, eval_str=True).parameters.values()
    types = get_type_hints(asked.annotation, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=types[field.name],
        )
        for field in fields(asked.annotation)
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(asked.annotation(**given))

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return run
