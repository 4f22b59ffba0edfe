"""The network on OpenVINO (CPU): one graph per modality, converted from torch and kept on disk.

Each graph is compiled twice. One computes an image on all cores, with the lowest latency. The other
computes several batches at the same time, each on its share of the cores, which then need not wait
for all others at the end of every layer: more images a second, most of all where something else
runs too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import CMT, Modality
from model.atomic_file import PRIVATE, write_whole
from model.config import MODALITIES
from model.cores import allowed_cores
from model.graphs import embedding_graph, to_openvino
from model.pixels import MEAN, STD
from model.quiet_openvino import openvino

log = logging.getLogger(__name__)

_MOST_STREAMS = 8  # the interpreter could not prepare more batches at once
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVINOBackend:
    """Pixels B×H×W×3 (uint8) of one modality → B×P×D in fp32, any B. Thread-safe.

    streams: how many calls of `beside` compute at once. precision: "float32", "bfloat16", or
    "auto": OpenVINO takes bf16 where the CPU has units for it. cache: a folder for converted
    graphs, or None; what is damaged there is converted again, and where nothing can be stored the
    log says so. quantised: the .xml files of the int8 form, to compute in the place of the
    checkpoint's own network; what is not quantised in them is in `precision`.
    Raises whatever OpenVINO raises where it cannot convert or compile.
    """

    def __init__(
        self,
        model: CMT,
        fingerprint: str,
        *,
        precision: str,
        cache: Path | None = None,
        quantised: Mapping[Modality, Path] | None = None,
    ) -> None:
        self._model, self._fingerprint, self._cache = model, fingerprint, cache
        self.quantised = quantised is not None
        cores = allowed_cores()
        self.streams = min(cores, _MOST_STREAMS)
        core = openvino.Core()
        settings: dict[str, object] = {}
        if cores < len(os.sched_getaffinity(0)):  # by a quota, which OpenVINO does not ask for
            settings["INFERENCE_NUM_THREADS"] = cores
        if precision != "auto":
            settings["INFERENCE_PRECISION_HINT"] = _PRECISIONS[precision]
        graphs = {
            m: _of_pixels(core.read_model(quantised[m]) if quantised else self._graph(core, m))
            for m in MODALITIES
        }
        with ThreadPoolExecutor(cores, "compile") as threads:  # each takes one core

            def compiled(**how: object) -> dict[Modality, Future[openvino.CompiledModel]]:
                settled = settings | how
                return {
                    m: threads.submit(core.compile_model, graph, "CPU", settled)
                    for m, graph in graphs.items()
                }

            whole = compiled(PERFORMANCE_HINT="LATENCY")
            shared = compiled(NUM_STREAMS=self.streams) if self.streams > 1 else whole
        self._whole = {m: future.result() for m, future in whole.items()}
        self._shared = {m: future.result() for m, future in shared.items()}
        self._own = _Own()

    @property
    def precision(self) -> str:
        """The number type of the graphs, as OpenVINO reports it: "f32", "bf16", …"""
        return str(self._whole["rgb"].get_property("INFERENCE_PRECISION_HINT").get_type_name())

    def __call__(self, pixels: Tensor, modality: Modality) -> Tensor:
        """On all cores: an image by all of them, a batch in one part for each stream."""
        if len(pixels) == 1:
            return self._computed(self._whole, [pixels], modality)
        return self._computed(self._shared, pixels.tensor_split(self.streams), modality)

    def beside(self, pixels: Tensor, modality: Modality) -> Tensor:
        """The same on one stream, at the same time as other calls."""
        return self._computed(self._shared, [pixels], modality)

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

    def _graph(self, core: openvino.Core, modality: Modality) -> openvino.Model:
        if self._cache is None:
            return to_openvino(embedding_graph(self._model, modality))
        # Another OpenVINO may convert otherwise: its version is part of the name.
        version = "".join(c if c.isalnum() else "-" for c in openvino.__version__.split("-")[0])
        files = _Files(self._cache / f"openvino-{version}-{self._fingerprint}-{modality}")
        if files.whole():
            return core.read_model(files.xml)
        graph = to_openvino(embedding_graph(self._model, modality))
        try:
            return files.stored(core, graph)
        except (OSError, RuntimeError) as error:  # RuntimeError: OpenVINO's own, of a full disk
            log.warning(
                "the converted network cannot be kept in %s (%s): it is converted again at every "
                "start until that is mended",
                self._cache,
                str(error).splitlines()[-1] if str(error) else type(error).__name__,
            )
            return graph


class _Files:
    """A converted graph on the disk, and a digest of it that is written last."""

    def __init__(self, stem: Path) -> None:
        self.xml, self._weights, self._digest = (
            stem.with_name(stem.name + suffix) for suffix in (".xml", ".bin", ".sha256")
        )

    def whole(self) -> bool:
        """Whether the files are there, readable and as they were written."""
        try:
            return self._digest.read_bytes() == _digest(self.xml, self._weights).encode()
        except OSError:  # not there, not readable, or a folder
            return False

    def stored(self, core: openvino.Core, graph: openvino.Model) -> openvino.Model:
        """Replace whatever is there → the graph as it is read from the files.

        Raises OSError or RuntimeError; nothing is left then.
        """
        self.xml.parent.mkdir(0o700, parents=True, exist_ok=True)
        self._remove()
        try:
            openvino.save_model(graph, self.xml, compress_to_fp16=False)
            for file in (self.xml, self._weights):
                file.chmod(PRIVATE)
            read = core.read_model(self.xml)  # a full disk may have cut a file, without an error
            # Last: files that a crash left incomplete have no matching one.
            write_whole(self._digest, _digest(self.xml, self._weights), PRIVATE)
        except BaseException:
            self._remove()
            raise
        return read

    def _remove(self) -> None:
        for file in (self._digest, self.xml, self._weights):
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)


class _Own(threading.local):
    """A thread's own infer requests, each of which holds the buffers of one call."""

    def __init__(self) -> None:
        self._of: dict[openvino.CompiledModel, list[openvino.InferRequest]] = {}

    def requests(self, graph: openvino.CompiledModel, count: int) -> list[openvino.InferRequest]:
        kept = self._of.setdefault(graph, [])
        while len(kept) < count:
            kept.append(graph.create_infer_request())
        return kept[:count]


def _of_pixels(graph: openvino.Model) -> openvino.Model:
    """Add `model.pixels.normalise` to the graph, so that the core of each image does it."""
    steps = openvino.preprocess.PrePostProcessor(graph)
    pixels = steps.input()
    pixels.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    pixels.model().set_layout(openvino.Layout("NCHW"))
    values = pixels.preprocess().convert_element_type(openvino.Type.f32)
    values.mean([255 * mean for mean in MEAN]).scale([255 * std for std in STD])
    return steps.build()


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
