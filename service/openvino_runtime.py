"""The network on OpenVINO (CPU): one graph per modality, converted from torch and kept on disk."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import CMT, Modality
from model.graphs import embedding_graph, to_openvino
from model.quiet_openvino import openvino

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVINONetwork:
    """B×3×H×W of one modality → B×P×D in fp32, any B. Thread-safe.

    precision: "float32", "bfloat16", or "auto": OpenVINO takes bf16 where the CPU has units for
    it. cache: a folder for converted graphs, or None; a damaged file there is converted again.
    """

    def __init__(self, model: CMT, fingerprint: str, *, precision: str, cache: Path | None) -> None:
        self._model, self._fingerprint, self._cache = model, fingerprint, cache
        core = openvino.Core()
        settings = {"PERFORMANCE_HINT": "LATENCY"}
        if precision != "auto":
            settings["INFERENCE_PRECISION_HINT"] = _PRECISIONS[precision]
        self._compiled = {
            modality: core.compile_model(self._graph(core, modality), "CPU", settings)
            for modality in ("rgb", "ir")
        }
        self._requests = threading.local()  # an infer request holds the buffers of one call

    @property
    def precision(self) -> str:
        """What the graphs compute in, as OpenVINO says: "f32", "bf16", …"""
        return str(self._compiled["rgb"].get_property("INFERENCE_PRECISION_HINT").get_type_name())

    def __call__(self, images: Tensor, modality: Modality) -> Tensor:
        request = getattr(self._requests, modality, None)
        if request is None:
            request = self._compiled[modality].create_infer_request()
            setattr(self._requests, modality, request)
        request.infer([np.ascontiguousarray(images.numpy())])
        return torch.from_numpy(request.get_output_tensor().data.copy())

    def _graph(self, core: openvino.Core, modality: Modality) -> openvino.Model:
        if self._cache is None:
            return to_openvino(embedding_graph(self._model, modality))
        # Another OpenVINO may convert otherwise: its version is part of the name.
        version = "".join(c if c.isalnum() else "-" for c in openvino.__version__.split("-")[0])
        stem = self._cache / f"openvino-{version}-{self._fingerprint}-{modality}"
        xml, weights, digest = (stem.with_name(stem.name + s) for s in (".xml", ".bin", ".sha256"))
        files = digest, xml, weights
        if all(f.is_file() for f in files) and digest.read_text() == _digest(xml, weights):
            return core.read_model(xml)
        graph = to_openvino(embedding_graph(self._model, modality))
        self._cache.mkdir(parents=True, exist_ok=True)
        digest.unlink(missing_ok=True)
        openvino.save_model(graph, xml, compress_to_fp16=False)
        # The digest comes last: what a crash leaves behind does not match it.
        partial = digest.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(_digest(xml, weights))
        partial.replace(digest)
        return core.read_model(xml)


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
