"""The network on OpenVINO (CPU): one graph per modality, converted from torch."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import CMT, CMTConfig, Modality
from model.cmt import ranked_mean
from model.graphs import to_openvino, view_graph
from model.modalities import MODALITIES
from model.quiet_openvino import openvino
from service.embedding.openvino_graphs import Compiled, GraphFiles, reader

log = logging.getLogger(__name__)


class OpenVINOBackend:
    """Pixels B×H×W×3 (uint8) of one modality → B×P×D in fp32, any B. Thread-safe.

    graphs: what computes, of `view_graph` or the int8 form. streams: how many calls of `beside`
    compute at once. quantised: whether the graphs are the int8 form, which has the mirror images
    and the ranked form in it, instead of the checkpoint's own network.
    """

    def __init__(self, graphs: Compiled, config: CMTConfig, *, quantised: bool = False) -> None:
        self.graphs, self.streams, self.quantised = graphs, graphs.streams, quantised
        self._config = config
        self._own = _Own()

    @property
    def precision(self) -> str:
        """The number type of the graphs, as OpenVINO reports it: "f32", "bf16", …"""
        return self.graphs.number_type

    def __call__(self, pixels: Tensor, modality: Modality) -> Tensor:
        """On all cores: one crop by all of them together, more in one part for each stream."""
        crops = pixels.numpy()
        if len(crops) > 1:
            return self._side_by_side(crops, self.streams, modality)
        (call,) = self._own.calls(self.graphs.lone[modality], 1)
        self._seen(crops, call.images(self._shape(crops)))
        call.compute()
        return self._embedding(call.output)

    def beside(self, pixels: Tensor, modality: Modality) -> Tensor:
        """The same on one stream, at the same time as other calls."""
        return self._side_by_side(pixels.numpy(), 1, modality)

    def _shape(self, crops: np.ndarray) -> tuple[int, ...]:
        return self.graphs.views * len(crops), *crops.shape[1:]

    def _seen(self, crops: np.ndarray, images: np.ndarray) -> np.ndarray:
        """The images to compute: the crops and, after all of them, their mirror images."""
        # In NumPy, as what comes after it: steps of PyTorch took a third of a lone crop's time,
        # most of it to wake its threads.
        images[: len(crops)] = crops
        if self.graphs.views > 1:
            for channel in range(crops.shape[-1]):  # four times as fast as all three at once
                images[len(crops) :, ..., channel] = crops[:, :, ::-1, channel]
        return images

    def _side_by_side(self, crops: np.ndarray, most: int, modality: Modality) -> Tensor:
        """Compute the views in parts at the same time, `most` at most."""
        images = self._seen(crops, np.empty(self._shape(crops), np.uint8))
        parts = np.array_split(images, min(most, len(images)))
        calls = self._own.calls(self.graphs.shared[modality], len(parts))
        with ExitStack() as under_way:  # waits for all, whichever fails
            for call, part in zip(calls, parts, strict=True):
                np.copyto(call.images(part.shape), part)
                call.start()
                under_way.callback(call.wait)
        return self._embedding(np.concatenate([call.output for call in calls]))

    def _embedding(self, complete: np.ndarray) -> Tensor:
        """What `CMT.represent` makes of the views' representations."""
        if self.quantised:
            return torch.from_numpy(complete.copy())
        of_views = complete.reshape(self.graphs.views, -1, *complete.shape[1:])
        return torch.from_numpy(ranked_mean(of_views, normalise=self._config.normalise_test))


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

    def images(self, shape: tuple[int, ...]) -> np.ndarray:
        """What is to be computed, to be filled."""
        if self._images.shape != shape:
            given = openvino.Tensor(openvino.Type.u8, shape)
            self._request.set_input_tensor(given)
            self._images = given.data
        return self._images

    def compute(self) -> None:
        """Raises what OpenVINO raises where it fails. The calling thread takes part."""
        self._request.infer()

    def start(self) -> None:
        """Begin to compute."""
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
