"""The network on OpenVINO (CPU): one graph per modality, converted from torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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

    A crop that nothing is computed beside has all cores; the crops of a batch, and of calls at the
    same time, are computed one by one on `streams` of one core each.
    graphs: what computes, of `view_graph` or the int8 form. quantised: whether the graphs are the
    int8 form, which has the mirror images and the ranked form in it, instead of the checkpoint's
    own network.
    """

    def __init__(self, graphs: Compiled, config: CMTConfig, *, quantised: bool = False) -> None:
        self.graphs, self.streams, self.quantised = graphs, graphs.streams, quantised
        self._config = config
        self._lone = {modality: _Calls(graph) for modality, graph in graphs.lone.items()}
        self._shared = {modality: _Calls(graph) for modality, graph in graphs.shared.items()}
        self._counting, self._under_way = threading.Lock(), 0

    @property
    def precision(self) -> str:
        """The number type of the graphs, as OpenVINO reports it: "f32", "bf16", …"""
        return self.graphs.number_type

    def __call__(self, pixels: Tensor, modality: Modality) -> Tensor:
        crops = pixels.numpy()
        with self._counted() as others:
            # A graph on all cores waits for each of them after every layer: not beside other work.
            if others or len(crops) > 1:
                views = self._shared[modality].together(crops)
            else:
                views = self._lone[modality].alone(crops[0])
        if self.quantised:
            return torch.from_numpy(views[0])
        return torch.from_numpy(ranked_mean(views, normalise=self._config.normalise_test))

    @contextmanager
    def _counted(self) -> Iterator[int]:
        """How many other calls are under way."""
        with self._counting:
            others = self._under_way
            self._under_way += 1
        try:
            yield others
        finally:
            with self._counting:
                self._under_way -= 1


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
    """An infer request for the views of one crop."""

    def __init__(self, graph: openvino.CompiledModel) -> None:
        self._request = graph.create_infer_request()
        self._views = self._request.get_input_tensor().data

    def fill(self, crop: np.ndarray) -> None:
        """Take the crop H×W×3 and, where the graph computes it, its mirror image."""
        # In NumPy, as what comes after it: steps of PyTorch took a third of a lone crop's time,
        # most of it to wake its threads.
        self._views[0] = crop
        if len(self._views) > 1:
            for channel in range(crop.shape[-1]):  # four times as fast as all three at once
                self._views[1, ..., channel] = crop[:, ::-1, channel]

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


class _Calls:
    """The infer requests of a graph for one crop, as many as were ever used at once."""

    def __init__(self, graph: openvino.CompiledModel) -> None:
        self._graph = graph
        self._idle: list[_Call] = []

    def alone(self, crop: np.ndarray) -> np.ndarray:
        """A crop H×W×3 → V×1×P×D of V views. Raises what OpenVINO raises where it fails."""
        call = self._call()
        call.fill(crop)
        call.compute()
        return self._outputs([call])

    def together(self, crops: np.ndarray) -> np.ndarray:
        """Crops B×H×W×3 → V×B×P×D, each crop on one of the graph's streams. Raises the same."""
        calls = []
        with ExitStack() as under_way:  # waits for all, whichever fails
            for crop in crops:
                calls.append(self._call())
                calls[-1].fill(crop)
                calls[-1].start()
                under_way.callback(calls[-1].wait)
        return self._outputs(calls)

    def _outputs(self, calls: list[_Call]) -> np.ndarray:
        views = np.stack([call.output for call in calls], axis=1)
        self._idle += calls
        return views

    def _call(self) -> _Call:
        try:
            return self._idle.pop()
        except IndexError:
            return _Call(self._graph)
