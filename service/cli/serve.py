"""`cmt serve`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from model.device import DEVICES
from model.importing import torch_library, without_collections
from service.cli.options import data_dir_option

Option = typer.Option


def serve(
    checkpoint: Annotated[
        Path | None, Option(help="The .safetensors file that `cmt train` wrote.")
    ] = None,
    data_dir: Annotated[
        Path | None, data_dir_option("Folder of the gallery; made if missing.")
    ] = None,
    host: Annotated[str | None, Option(help="Address to bind, 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, Option(help="Port, 8000 by default; 0 takes a free one.")] = None,
    device: Annotated[
        str | None, Option(help=f"Where the network and search run: {DEVICES}.")
    ] = None,
    runtime: Annotated[
        Literal["auto", "torch", "openvino", "int8"] | None, Option(help="What runs the network.")
    ] = None,
    engine: Annotated[
        Literal["embedded", "ray"] | None,
        Option(help="Where the gallery is: in this process, or in shards on Ray."),
    ] = None,
    shards: Annotated[int | None, Option(help="How many, with --engine ray.")] = None,
    api_keys_file: Annotated[
        Path | None, Option(help="Keys made by `cmt keys create`; needed beyond loopback.")
    ] = None,
    config: Annotated[
        Path | None, Option(help="TOML file of settings; CMT_CONFIG names one too.")
    ] = None,
) -> None:
    """Serve the API until Ctrl-C or SIGTERM.

    Every setting is also an environment variable CMT_<NAME> and a key of the TOML file; an option
    wins over the environment, that over the file.

    Example: cmt serve --checkpoint model.safetensors --data-dir data
    """
    with without_collections():
        from service.observability.logs import configure_logs
        from service.pipeline.begun import begun
        from service.settings import load_settings

    settings = load_settings(
        config,
        checkpoint=checkpoint,
        data_dir=data_dir,
        host=host,
        port=port,
        device=device,
        runtime=runtime,
        engine=engine,
        shards=shards,
        api_keys_file=api_keys_file,
    )
    configure_logs(settings.log_format, settings.log_level)
    with without_collections():
        import_module("uvicorn")
        with torch_library():
            # Written in Python: what loads a library itself would wait for torch's.
            import_module("fastapi")
            import_module("service.api.schemas")
    with begun(settings) as started:  # goes on while this process loads torch
        with without_collections():
            from service.server import run

        run(settings, started)
