"""The network on OpenVINO (CPU): one graph per modality, converted from torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import CMT, Modality
from model.graphs import embedding_graph, to_openvino
from model.modalities import MODALITIES
from model.quiet_openvino import openvino
from service.embedding.openvino_graphs import Compiled, GraphFiles

log = logging.getLogger(__name__)


class OpenVINOBackend:
    """Pixels B×H×W×3 (uint8) of one modality → B×P×D in fp32, any B. Thread-safe.

    graphs: what computes. streams: how many calls of `beside` compute at once. quantised: whether
    the graphs are the int8 form instead of the checkpoint's own network.
    """

    def __init__(self, graphs: Compiled, *, quantised: bool = False) -> None:
        self.graphs, self.streams, self.quantised = graphs, graphs.streams, quantised
        self._own = _Own()

    @property
    def precision(self) -> str:
        """The number type of the graphs, as OpenVINO reports it: "f32", "bf16", …"""
        return self.graphs.number_type

    def __call__(self, pixels: Tensor, modality: Modality) -> Tensor:
        """On all cores: an image by all of them, a batch in one part for each stream."""
        if len(pixels) == 1:
            return self._computed(self.graphs.whole, [pixels], modality)
        return self._computed(self.graphs.shared, pixels.tensor_split(self.streams), modality)

    def beside(self, pixels: Tensor, modality: Modality) -> Tensor:
        """The same on one stream, at the same time as other calls."""
        return self._computed(self.graphs.shared, [pixels], modality)

    def _computed(
        self,
        graphs: dict[Modality, openvino.CompiledModel],
        parts: Sequence[Tensor],
        modality: Modality,
    ) -> Tensor:
        """Compute the parts at the same time."""
        parts = [part for part in parts if len(part)]
        requests = self._own.requests(graphs[modality], len(parts))
        with ExitStack() as under_way:  # waits for all, whichever fails
            for request, part in zip(requests, parts, strict=True):
                request.start_async([np.ascontiguousarray(part.numpy())], share_inputs=True)
                under_way.callback(request.wait)
        return torch.from_numpy(np.concatenate([r.get_output_tensor().data for r in requests]))


def converted(
    model: CMT, fingerprint: str, cache: Path | None = None
) -> dict[Modality, openvino.Model]:
    """The graphs of a network.

    cache: a folder for converted graphs, or None; what is damaged there is converted again, and
    where nothing can be stored the log says so.
    Raises whatever OpenVINO raises where it cannot convert.
    """
    return {modality: _graph(model, fingerprint, cache, modality) for modality in MODALITIES}


def _graph(model: CMT, fingerprint: str, cache: Path | None, modality: Modality) -> openvino.Model:
    if cache is None:
        return to_openvino(embedding_graph(model, modality))
    core, files = openvino.Core(), GraphFiles(cache, fingerprint, modality)
    if files.digest() is not None:
        return core.read_model(files.xml)
    graph = to_openvino(embedding_graph(model, modality))
    try:
        return files.stored(core, graph)
    except (OSError, RuntimeError) as error:  # RuntimeError: OpenVINO's own, of a full disk
        log.warning(
            "the converted network cannot be kept in %s (%s): it is converted again at every "
            "start until that is mended",
            cache,
            str(error).splitlines()[-1] if str(error) else type(error).__name__,
        )
        return graph


class _Own(threading.local):
    """A thread's own infer requests, each of which holds the buffers of one call."""

    def __init__(self) -> None:
        self._of: dict[openvino.CompiledModel, list[openvino.InferRequest]] = {}

    def requests(self, graph: openvino.CompiledModel, count: int) -> list[openvino.InferRequest]:
        kept = self._of.setdefault(graph, [])
        while len(kept) < count:
            kept.append(graph.create_infer_request())
        return kept[:count]
