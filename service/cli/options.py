"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service.client import DEFAULT_URL, Client


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
    "Client",
    "KeysFile",
    "ModalityOption",
    "PolarityOption",
    "Url",
]
