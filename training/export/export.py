"""A checkpoint → files of several formats, each compared with PyTorch before any is kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from model import CMT, CheckpointInfo, Modality
from model.graphs import all_graphs
from training.export.folder import DESCRIPTION_FILE, ExportError, describe, replaced
from training.export.formats import Format
from training.export.parity import Parity, check_parity, reference
from training.files import write_file


def write_export(
    model: CMT,
    info: CheckpointInfo,
    formats: Sequence[Format],
    images: Mapping[Modality, Tensor],
    output: Path,
) -> list[Parity]:
    """Convert, compare on `images`, and only then put the files and `export.json` into `output`.

    images: N×3×H×W of each modality, preprocessed.
    Returns one report a format. Raises ExportError where a format does not give PyTorch's numbers;
    `output` is then as it was.
    """
    graphs, expected = all_graphs(model), reference(model, images)
    files: dict[str, list[Path]] = {graph.name: [] for graph in graphs}
    parities = []
    with replaced(output) as folder:
        for form in formats:
            runners = {}
            for graph in graphs:
                written = form.write(graph, folder)
                files[graph.name] += written
                runners[graph.name] = form.open(written[0])
            parities.append(check_parity(form.name, runners, model, images, expected))
            if not parities[-1].passed:
                raise ExportError(
                    f"{parities[-1].problem()}; nothing was written: try the versions of torch, "
                    f"{form.name} and its runtime that constraints.txt names, and report the "
                    "difference if it stays"
                )
        content = describe(info, graphs, files, parities)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_file(folder / DESCRIPTION_FILE, text)
    return parities
