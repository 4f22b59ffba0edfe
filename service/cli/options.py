"""Options that several commands share."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service.kit.urls import DEFAULT_URL

_DATA_DIR = "CMT_DATA_DIR"


class Modality(StrEnum):
    """Modalities, where several may be chosen: Typer takes no list of a Literal."""

    RGB = "rgb"
    IR = "ir"


class KeyScope(StrEnum):
    """`service.auth.keys.Scope` as an enumeration, for the same reason."""

    QUERY = "query"
    ENROLL = "enroll"
    ADMIN = "admin"


Url = Annotated[str, typer.Option("--url", envvar="CMT_URL", help="Address of the service.")]
Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        envvar="CMT_URL",
        show_default=DEFAULT_URL,
        help="Address of the service; repeat it for several of one gallery, which share the work.",
    ),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="CMT_DATABASE_URL", help="Another database than the SQLite file in the data folder."
    ),
]
CropsUrl = Annotated[
    str | None,
    typer.Option(
        envvar="CMT_CROPS_URL", help="Bucket of the gallery's large crops, where it has one."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="CMT_API_KEY", help="Key of the service, better set as CMT_API_KEY."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ModalityOption = Annotated[
    Literal["auto", "rgb", "ir"] | None,
    typer.Option(
        help="Kind of light; auto takes an image without color for infrared. Default: the "
        "camera's, else auto."
    ),
]
PolarityOption = Annotated[
    Literal["white_hot", "black_hot"] | None,
    typer.Option(
        help="Of infrared: black_hot where warm is dark. Default: the camera's, else white_hot."
    ),
]


def folder(text: str) -> Path:
    """Parse a folder's name. An empty one, as of an unset variable, is not the current folder."""
    if not text.strip():
        raise typer.BadParameter("it is empty; name a folder, such as data")
    return Path(text)


def _refuse_empty_variable(given: Path | None) -> Path | None:
    """Refuse an empty CMT_DATA_DIR, which Typer takes for one that is not set."""
    if given is None and os.environ.get(_DATA_DIR) == "":
        raise typer.BadParameter(f"{_DATA_DIR} is empty; set it to a folder, such as data")
    return given


def data_dir_option(text: str, *, variable: bool = False) -> Any:
    """The option --data-dir with its help. variable: CMT_DATA_DIR stands for it, too."""
    return typer.Option(
        "--data-dir",
        help=text,
        metavar="DIR",
        parser=folder,
        envvar=_DATA_DIR if variable else None,
        callback=_refuse_empty_variable if variable else None,
    )


KeysFile = Annotated[
    Path, typer.Option("--file", envvar="CMT_API_KEYS_FILE", help="The file of keys.")
]

# A table without frame: an id and six columns fit 80 characters.
PLAIN: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 1, 0, 0)}

__all__ = [
    "DEFAULT_URL",
    "PLAIN",
    "ApiKey",
    "AsJson",
    "KeysFile",
    "ModalityOption",
    "PolarityOption",
    "Url",
    "Urls",
    "data_dir_option",
    "folder",
]
