"""`cmt doctor`: what this machine offers, and what is wrong."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from model.device import DEVICES, chosen_device
from model.terminal import Console
from service.cli.options import data_dir_option
from service.kit.text import counted

_LOW_DISK = 1 << 30


class Trouble(Exception):  # noqa: N818 (a finding, not a failure of the command)
    """What a check found wrong; the message says the remedy."""


class Caution(Exception):  # noqa: N818
    """What works and should be better; the message says the remedy."""


def doctor(
    checkpoint: Annotated[
        Path | None, typer.Option(envvar="CMT_CHECKPOINT", help="Check this checkpoint too.")
    ] = None,
    data_dir: Annotated[
        Path | None, data_dir_option("Check this data folder too.", variable=True)
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(envvar="CMT_DATABASE_URL", help="Check this database too.")
    ] = None,
    crops_url: Annotated[
        str | None,
        typer.Option(
            envvar="CMT_CROPS_URL", help="Check this bucket too; an object is written and deleted."
        ),
    ] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(envvar="CMT_API_KEYS_FILE", help="Check this file too.")
    ] = None,
    device: Annotated[
        str, typer.Option(envvar="CMT_DEVICE", help=f"What the service uses: {DEVICES}.")
    ] = "auto",
) -> None:
    """Check device, libraries, disk, checkpoint, database, bucket and keys: say what is wrong.

    With a checkpoint also how many items fit into the memory that is free. The exit status is 1 if
    something is wrong.

    Example: cmt doctor --checkpoint model.safetensors --data-dir data
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("torch", lambda: _torch(device)),
        ("precision", lambda: _precision(device)),
        ("faiss", _faiss),
        ("OpenVINO", _openvino),
        ("decoding", _decoding),
    ]
    if checkpoint is not None:
        checks.append(("checkpoint", lambda: _checkpoint(checkpoint, device)))
    if data_dir is not None:
        checks.append(("data folder", lambda: _data_dir(data_dir)))
    if database_url is not None:
        checks.append(("database", lambda: _database(database_url)))
    if crops_url is not None:
        checks.append(("crops", lambda: _crops(crops_url)))
    if api_keys_file is not None:
        checks.append(("API keys", lambda: _keys(api_keys_file)))
    table = Table("check", "", "finding")
    healthy = True
    for name, check in checks:
        try:
            mark, finding = Text("ok", "green"), check()
        except Caution as caution:
            mark, finding = Text("warning", "yellow"), str(caution)
        except Exception as error:  # whatever a library raises is the finding
            mark, finding, healthy = Text("wrong", "red"), str(error) or type(error).__name__, False
        table.add_row(name, mark, finding)
    Console().print_table(table)
    if not healthy:
        raise typer.Exit(1)


def _torch(device: str) -> str:
    import torch

    name = chosen_device(device)
    if name == "cpu":
        return f"torch {torch.__version__}, CPU with {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {torch.cuda.get_device_name(name)} as {name}"


def _precision(device: str) -> str:
    from model.precision import choose_precision

    return choose_precision(chosen_device(device)).reason


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


def _checkpoint(path: Path, device: str) -> str:
    from model import load_checkpoint

    _, info = load_checkpoint(path)
    config = info.config
    return (
        f"{info.fingerprint[:12]}: {config.backbone} at width {config.width}, "
        f"{config.parts} parts of {config.dim}, {config.input_height}×{config.input_width}; "
        f"{_room((config.parts + 1) * config.dim, chosen_device(device))}"
    )


def _room(width: int, device: str) -> str:
    from service.gallery.index.room import capacity

    found = capacity(width, device)
    if found.on_device is None:
        return f"{counted(found.on_host, 'item')} fit into the memory that is free"
    return (
        f"{counted(found.on_device, 'item')} fit into the GPU's memory that is free, and "
        f"{found.on_host:,} more into the host's, where searches are slower"
    )


def _data_dir(folder: Path) -> str:
    from service.gallery.storage.audit import KEY_FILE, read_key
    from service.gallery.storage.database import FILE_NAME
    from service.gallery.storage.folder_lock import take_lock
    from service.gallery.storage.private_files import open_to_others, told

    if not folder.is_dir():
        raise Trouble(f"there is no folder {folder}; `cmt serve` makes it")
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"writable")
        take_lock(probe.fileno(), folder)
        keeps_modes = not os.fstat(probe.fileno()).st_mode & 0o077
    free = shutil.disk_usage(folder).free
    if free < _LOW_DISK:
        raise Trouble(f"only {free / 1e6:.0f} MB are free under {folder}; make room")
    if (folder / KEY_FILE).exists():
        read_key(folder / KEY_FILE)
    elif (folder / FILE_NAME).exists():
        raise Caution(
            f"the audit log's key {folder / KEY_FILE} is missing: put it back from a backup, or "
            "the next start of the service makes another, and persons have other pseudonyms then"
        )
    if found := open_to_others(folder):
        owner = found[0].stat().st_uid
        if not keeps_modes:
            raise Caution(told(folder, found, "its file system keeps no modes"))
        if os.geteuid() not in (0, owner):
            raise Caution(told(folder, found, f"it belongs to user {owner}"))
        raise Caution(
            f"others may use {len(found)} files or folders of {folder}, such as {found[0]}; the "
            "next start of the service changes that"
        )
    return f"writable, lockable and private, {free / 1e9:.0f} GB free"


def _decoding() -> str:
    from service.images.decode import ImageLimits
    from service.images.pool import Decoders
    from service.pipeline.self_check import builtin_picture

    decoders = Decoders(1, ImageLimits(), seconds=10)
    try:
        decoders.decode(builtin_picture(), 128, 64)
    finally:
        decoders.close()
    return "a process of its own decodes images"


def _database(url: str) -> str:
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError

    from service.gallery.storage.database import address_of
    from service.gallery.storage.replicas import clocks_differ
    from service.gallery.times import utc_now
    from service.kit.urls import without_password

    address = address_of(Path(), url)
    shown = without_password(address)
    try:
        engine = create_engine(address)
        with engine.connect() as connection:
            started = utc_now()
            moment = connection.execute(text("SELECT CURRENT_TIMESTAMP")).scalar_one()
            took = (utc_now() - started).total_seconds()
            server = engine.dialect.server_version_info or ()
        engine.dispose()
    except SQLAlchemyError as error:
        reason = str(error).splitlines()[0]
        raise Trouble(
            f"the database does not answer: {reason}; check the URL and the server"
        ) from error
    if address.get_backend_name() == "postgresql":  # SQLite's is this machine's
        differ = clocks_differ((started - moment).total_seconds(), took)
        if differ is not None:
            raise Caution(differ)
    return f"{shown}: {engine.dialect.name} {'.'.join(map(str, server))}"


def _crops(url: str) -> str:
    from service.gallery.storage.objects import ObjectStorage

    with closing(ObjectStorage(url)) as storage:
        cautions = storage.probe()
        if cautions:
            raise Caution("; ".join(cautions))
        return f"{storage.address}: written, read and deleted"


def _keys(path: Path) -> str:
    from service.auth.keys import KeyFile

    keys = KeyFile(path).read()
    if not keys:
        raise Trouble(f"{path} holds no key; make one with `cmt keys create --file {path}`")
    status = path.stat()
    # A file of somebody else's is shared with this user by its group: a mounted secret is such.
    if status.st_mode & (0o077 if status.st_uid == os.geteuid() else 0o007):
        raise Trouble(f"others may read {path}; run `chmod 600 {path}`")
    scopes = sorted({scope for key in keys for scope in key.scopes})
    return f"{counted(len(keys), 'key')}, for {', '.join(scopes)}"
