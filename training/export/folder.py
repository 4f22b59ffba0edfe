"""The folder of an export: the graphs' files and `export.json`, put in place all at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model import CheckpointInfo
from model.graphs import Graph
from model.machine import machine
from model.pixels import MEAN, STD
from model.strict_json import read_json
from training.export.formats import OPSET
from training.export.parity import LEAST_COSINE, MOST_ERROR, MOST_SWAPPED, Parity

DESCRIPTION_FILE = "export.json"
FORMAT = "cmt-export"
VERSION = 1

# What a gallery's and a query's embedding are compared by, for a reader without this package.
DISTANCES = {
    "euclidean": "D(x, y) = sqrt(sum over P and D of (x - (gamma * y + beta))^2)",
    "cosine": "D(x, y) = 1 - cosine of x and (gamma * y + beta), over all P*D numbers",
}


class ExportError(ValueError):
    """An export that is not written; the message says why and what to do."""


def check_output(
    output: Path, fingerprint: str, *, overwrite: bool, description_file: str = DESCRIPTION_FILE
) -> None:
    """ExportError where `output` holds something that an export must not replace.

    description_file: what an export of this kind is known by.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ExportError(f"{output} is a file; give a folder that is empty or not there yet")
    if not any(output.iterdir()):
        return
    description = output / description_file
    try:
        content = read_json(description.read_text(encoding="utf-8"))
        names = {description_file, *(f for g in content["graphs"] for f in g["files"])}
        there = str(content["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{output} is not empty and holds no export; give a folder that is empty or not there "
            "yet"
        ) from error
    strangers = sorted(path.name for path in output.iterdir() if path.name not in names)
    if strangers:
        raise ExportError(
            f"{output} holds {strangers[0]} beside an export, which would be lost; move it, or "
            "give another folder"
        )
    if there != fingerprint and not overwrite:
        raise ExportError(
            f"{output} holds the export of another checkpoint, fingerprint {there[:16]}; give "
            "another folder, or add --overwrite"
        )


@contextmanager
def replaced(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block ends without an error.

    An error removes the new folder and leaves `output` as it was.
    """
    output = output.resolve()
    fresh, former = (output.with_name(f".{output.name}.{os.getpid()}.{w}") for w in ("new", "old"))
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if output.exists():
            output.rename(former)
        try:
            fresh.rename(output)
        except OSError:
            if former.exists():
                former.rename(output)
            raise
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def describe(
    info: CheckpointInfo,
    graphs: Sequence[Graph],
    files: dict[str, list[Path]],
    parities: Sequence[Parity],
) -> dict[str, Any]:
    """What `export.json` says: how to run the graphs, and how they were checked.

    files: graph name → its files, of all formats.
    """
    config = info.config
    facts = ("dataset", "license", "credits")
    known = {"learnt_from": info.facts.people(), "selected_on": info.facts.selecting_people()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": info.fingerprint,
        "config": config.model_dump(mode="json"),
        "training": {fact: info.training[fact] for fact in facts if fact in info.training}
        | {fact: [one.model_dump() for one in people] for fact, people in known.items() if people},
        "preprocessing": {
            "channels": "RGB; an infrared image's one channel three times",
            "height": config.input_height,
            "width": config.input_width,
            "resampling": "bilinear, as Pillow's Image.resize",
            "scale": 1 / 255,
            "mean": list(MEAN),
            "std": list(STD),
        },
        "graphs": [
            {
                "name": graph.name,
                "files": [path.name for path in files[graph.name]],
                "inputs": [_tensor(graph.input, graph.example.shape[1:])],
                "outputs": [_tensor(name, shape) for name, shape in graph.outputs.items()],
            }
            for graph in graphs
        ],
        "distance": DISTANCES[config.metric],
        "onnx_opset": OPSET,
        "parity": {
            "limits": {
                "relative_error": MOST_ERROR,
                "min_cosine": LEAST_COSINE,
                "largest_swap": MOST_SWAPPED,
            },
            "formats": [asdict(parity) for parity in parities],
        },
        "machine": machine(),
    }


def _tensor(name: str, shape: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "shape": ["B", *shape], "dtype": "float32"}
