"""The int8 form of a checkpoint: a folder beside it, which `cmt export` writes and a service reads.

`demo.safetensors` has `demo.int8/`: OpenVINO graphs of both embeddings, and `int8.json`, which says
of which checkpoint they are, their digests, and how they were checked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from model.modalities import MODALITIES, Modality, embedding_name
from model.strict_json import read_json

DESCRIPTION_FILE = "int8.json"
FORMAT = "cmt-int8"
VERSION = 1
# Of one image's features with those in fp32; the folder of a checkpoint that falls short is never
# written, nor used on a machine where it does.
LEAST_COSINE = 0.995


class Int8Error(ValueError):
    """No int8 form that may be used; the message says why and what to do."""


@dataclass(frozen=True)
class Int8:
    """Verified files.

    graphs: the .xml files, each with its .bin beside it. held_out: whether the ranking of people
    whom the network does not know was compared, too.
    """

    graphs: dict[Modality, Path]
    held_out: bool


def int8_folder(checkpoint: Path) -> Path:
    """Where the int8 form of a checkpoint is looked for."""
    return checkpoint.with_suffix(".int8")


def digests(folder: Path) -> dict[str, str]:
    """Names of the graphs' files → their SHA-256. Raises OSError."""
    names = [embedding_name(m) + suffix for m in MODALITIES for suffix in (".xml", ".bin")]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def read_int8(checkpoint: Path, fingerprint: str) -> Int8:
    """The int8 form beside a checkpoint.

    fingerprint: the checkpoint's.
    Raises Int8Error where there is none, it is of another checkpoint or release, or it is damaged.
    """
    folder = int8_folder(checkpoint)
    remedy = "write it with cmt export --format int8, or use another runtime"
    try:
        facts = read_json((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        kind = facts["format"], facts["version"]
        of, noted, held_out = facts["fingerprint"], facts["sha256"], facts["held_out"]
        whole = noted == digests(folder)
    except FileNotFoundError as error:
        raise Int8Error(f"there is no int8 form of the checkpoint in {folder}; {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Int8Error(f"the int8 form in {folder} cannot be read; {remedy}") from error
    if kind != (FORMAT, VERSION):
        raise Int8Error(f"the int8 form in {folder} is of another release; {remedy}")
    if of != fingerprint:
        raise Int8Error(f"the int8 form in {folder} is of another checkpoint; {remedy}")
    if not whole:
        raise Int8Error(f"the int8 form in {folder} is damaged; {remedy}")
    graphs = {m: folder / f"{embedding_name(m)}.xml" for m in MODALITIES}
    return Int8(graphs, held_out is not None)
