"""`cmt doctor`: what this machine offers, and what is wrong."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_LOW_DISK = 1 << 30


class Trouble(Exception):  # noqa: N818 (a finding, not a failure of the command)
    """What a check found wrong; the message says the remedy."""


def doctor(
    checkpoint: Annotated[
        Path | None, typer.Option(envvar="CMT_CHECKPOINT", help="Check this checkpoint too.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(envvar="CMT_DATA_DIR", help="Check this data folder too.")
    ] = None,
) -> None:
    """Check device, libraries, disk and checkpoint; the exit status is 1 if something is wrong.

    Example: cmt doctor --checkpoint model.safetensors --data-dir data
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("torch", _torch),
        ("precision", _precision),
        ("faiss", _faiss),
        ("OpenVINO", _openvino),
    ]
    if checkpoint is not None:
        checks.append(("checkpoint", lambda: _checkpoint(checkpoint)))
    if data_dir is not None:
        checks.append(("data folder", lambda: _data_dir(data_dir)))
    table = Table("check", "", "finding")
    healthy = True
    for name, check in checks:
        try:
            mark, finding = "[green]ok[/]", check()
        except Exception as error:  # whatever a library raises is the finding
            mark, finding, healthy = "[red]wrong[/]", str(error) or type(error).__name__, False
        table.add_row(name, mark, escape(finding))
    Console().print(table)
    if not healthy:
        raise typer.Exit(1)


def _torch() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__}, CPU with {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"


def _precision() -> str:
    import torch

    from model.precision import choose_precision

    return choose_precision("cuda" if torch.cuda.is_available() else "cpu").reason


def _faiss() -> str:
    try:
        import faiss
    except ImportError as error:
        raise Trouble(
            f"faiss cannot be imported ({error}); install the extra cpu or gpu"
        ) from error
    return f"faiss {faiss.__version__}, {faiss.get_num_gpus()} GPUs"


def _openvino() -> str:
    if find_spec("openvino") is None:
        return "not installed: torch embeds on the CPU too; the extra cpu brings it"
    return f"openvino {version('openvino')}"


def _checkpoint(path: Path) -> str:
    from model import load_checkpoint

    _, info = load_checkpoint(path)
    config = info.config
    return (
        f"{info.fingerprint[:12]}: {config.backbone} at width {config.width}, "
        f"{config.parts} parts of {config.dim}, {config.input_height}×{config.input_width}"
    )


def _data_dir(folder: Path) -> str:
    if not folder.is_dir():
        raise Trouble(f"there is no folder {folder}; `cmt serve` makes it")
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"writable")
    free = shutil.disk_usage(folder).free
    if free < _LOW_DISK:
        raise Trouble(f"only {free / 1e6:.0f} MB are free under {folder}; make room")
    return f"writable, {free / 1e9:.0f} GB free"
