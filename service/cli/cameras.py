"""`cmt cameras`: what holds for a camera's pictures that do not say it themselves."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from model.terminal import Console, say, say_json
from service.cli.options import (
    DEFAULT_URL,
    PLAIN,
    ApiKey,
    AsJson,
    ModalityOption,
    PolarityOption,
    Url,
)
from service.client import Client

cameras = typer.Typer(
    no_args_is_help=True,
    help="Defaults of cameras: the modality and polarity of pictures that come without.\n\n"
    "Example: cmt cameras set dome --modality ir --polarity black_hot",
)

CameraId = Annotated[str, typer.Argument(metavar="CAMERA_ID")]


@cameras.command("list")
def list_cameras(json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List the cameras that have defaults.

    Example: cmt cameras list
    """
    table = Table("camera", "modality", "polarity", **PLAIN)
    with Client(url, api_key=api_key) as client:
        for camera in client.cameras():
            if json:
                say_json(camera.model_dump_json())
            table.add_row(camera.camera_id, camera.modality or "-", camera.polarity or "-")
    if not json:
        Console().print_table(table)


@cameras.command("set")
def set_camera(
    camera_id: CameraId,
    modality: ModalityOption = None,
    polarity: PolarityOption = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Set a camera's defaults, in place of all those it had.

    They hold for what is enrolled with this camera from now on, and for queries with
    --query-camera-id. What is enrolled already stays as it is.

    Example: cmt cameras set dome --modality ir --polarity black_hot
    """
    if modality is None and polarity is None:
        raise typer.BadParameter("give --modality, --polarity or both; `delete` removes them")
    with Client(url, api_key=api_key) as client:
        camera = client.set_camera(camera_id, modality=modality, polarity=polarity)
    told = ", ".join(str(value) for value in (camera.modality, camera.polarity) if value)
    say(f"Pictures of {camera.camera_id} are {told} unless they are said to be something else.")


@cameras.command("delete")
def delete_camera(camera_id: CameraId, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Forget a camera's defaults. Its items stay.

    Example: cmt cameras delete dome
    """
    with Client(url, api_key=api_key) as client:
        client.delete_camera(camera_id)
    say(f"Forgot the defaults of {camera_id}.")
