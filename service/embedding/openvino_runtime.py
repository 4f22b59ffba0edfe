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

from model import CMT, CMTConfig, Modality
from model.graphs import to_openvino, view_graph
from model.modalities import MODALITIES
from model.quiet_openvino import openvino
from service.embedding.openvino_graphs import Compiled, GraphFiles, reader

log = logging.getLogger(__name__)

_LEAST_LENGTH = 1e-12  # as `torch.nn.functional.normalize` has it


class OpenVINOBackend:
    """Pixels B×H×W×3 (uint8) of one modality → B×P×D in fp32, any B. Thread-safe.

    graphs: what computes, of `view_graph` or the int8 form. streams: how many calls of `beside`
    compute at once. quantised: whether the graphs are the int8 form, which has the mirror images
    and the ranked form in it, instead of the checkpoint's own network.
    """

    def __init__(self, graphs: Compiled, config: CMTConfig, *, quantised: bool = False) -> None:
        self.graphs, self.streams, self.quantised = graphs, graphs.streams, quantised
        self._config, self._mirror = config, config.mirror and not quantised
        self._own = _Own()

    @property
    def precision(self) -> str:
        """The number type of the graphs, as OpenVINO reports it: "f32", "bf16", …"""
        return self.graphs.number_type

    def __call__(self, pixels: Tensor, modality: Modality) -> Tensor:
        """On all cores: few images by all of them together, more in one part for each stream.

        Where there are two streams, a crop is computed on one and its mirror image on the other:
        for both in one batch the cores would wait for each other after every layer.
        """
        images = self._views(pixels)
        if len(images) < self.streams:
            return self._computed(self.graphs.whole, [images], modality)
        return self._computed(self.graphs.shared, np.array_split(images, self.streams), modality)

    def beside(self, pixels: Tensor, modality: Modality) -> Tensor:
        """The same on one stream, at the same time as other calls."""
        return self._computed(self.graphs.shared, [self._views(pixels)], modality)

    def _views(self, pixels: Tensor) -> np.ndarray:
        """The images to compute: the crops and, after all of them, their mirror images."""
        # In NumPy, as below: steps of PyTorch took a third of a lone crop's time, most of it to
        # wake its threads.
        crops = pixels.numpy()
        if not self._mirror:
            return crops
        images = np.empty((2, *crops.shape), np.uint8)
        images[0] = crops
        for channel in range(crops.shape[-1]):  # four times as fast as all three at once
            images[1, ..., channel] = crops[:, :, ::-1, channel]
        return images.reshape(-1, *crops.shape[1:])

    def _computed(
        self,
        graphs: dict[Modality, openvino.CompiledModel],
        parts: Sequence[np.ndarray],
        modality: Modality,
    ) -> Tensor:
        """Compute the parts at the same time."""
        calls = self._own.calls(graphs[modality], len(parts))
        with ExitStack() as under_way:  # waits for all, whichever fails
            for call, part in zip(calls, parts, strict=True):
                call.start(part)
                under_way.callback(call.wait)
        given = np.concatenate([call.output for call in calls])
        return torch.from_numpy(given if self.quantised else self._embedding(given))

    def _embedding(self, complete: np.ndarray) -> np.ndarray:
        """What `CMT.represent` makes of the views' representations."""
        if self._mirror:
            crops = len(complete) // 2
            complete = (complete[:crops] + complete[crops:]) / 2
        if not self._config.normalise_test:
            return complete
        lengths = np.linalg.norm(complete.reshape(len(complete), -1), axis=1)
        unit: np.ndarray = complete / np.maximum(lengths, _LEAST_LENGTH)[:, None, None]
        return unit


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
        return to_openvino(view_graph(model, modality))
    core, files = reader(), GraphFiles(cache, fingerprint, modality)
    if files.digest() is not None:
        return core.read_model(files.xml)
    graph = to_openvino(view_graph(model, modality))
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


class _Call:
    """An infer request and the memory that it reads, which OpenVINO owns."""

    def __init__(self, graph: openvino.CompiledModel) -> None:
        self._request = graph.create_infer_request()
        self._images = np.empty(0, np.uint8)

    def start(self, images: np.ndarray) -> None:
        """Begin to compute a copy of the images."""
        if self._images.shape != images.shape:
            given = openvino.Tensor(openvino.Type.u8, images.shape)
            self._request.set_input_tensor(given)
            self._images = given.data
        np.copyto(self._images, images)
        self._request.start_async()

    def wait(self) -> None:
        """Raises what OpenVINO raises where it failed."""
        self._request.wait()

    @property
    def output(self) -> np.ndarray:
        """What was computed, until the next start."""
        computed: np.ndarray = self._request.get_output_tensor().data
        return computed


class _Own(threading.local):
    """A thread's own calls."""

    def __init__(self) -> None:
        self._of: dict[openvino.CompiledModel, list[_Call]] = {}

    def calls(self, graph: openvino.CompiledModel, count: int) -> list[_Call]:
        kept = self._of.setdefault(graph, [])
        while len(kept) < count:
            kept.append(_Call(graph))
        return kept[:count]
