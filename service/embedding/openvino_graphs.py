"""The network's graphs on OpenVINO: kept on disk, and compiled. Loads no torch.

Each graph is compiled twice, both times for the views of one crop: a fixed size takes a seventh
less time than an open one. One computes a crop on all cores, with the lowest latency. The other
computes several crops at the same time, each on its share of the cores, which then need not wait
for all others at the end of every layer: more crops a second, most of all where something else runs
too. Graphs of several crops gain a few hundredths more, and need further copies of the weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from model.atomic_file import PRIVATE, write_whole
from model.cores import allowed_cores
from model.fixed_batch import NUMBER_TYPE, fixed_batch
from model.modalities import Modality
from model.pixels import MEAN, STD
from model.quiet_openvino import openvino

_MOST_STREAMS = 32  # the interpreter could not prepare more crops at once
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Compiled:
    """The graphs of both modalities, which take pixels.

    precision: what OpenVINO was asked for: "float32", "bfloat16", or "auto". views: the images of
    one crop, as many as the graphs take. lone: for a crop on all cores. shared: for `streams` crops
    at the same time.
    """

    precision: str
    views: int
    lone: dict[Modality, openvino.CompiledModel]
    shared: dict[Modality, openvino.CompiledModel]
    streams: int

    @property
    def number_type(self) -> str:
        """Of the graphs, as OpenVINO reports it: "f32", "bf16", …"""
        return str(self.lone["rgb"].get_property(NUMBER_TYPE).get_type_name())


def reader() -> openvino.Core:
    """OpenVINO, which copies the weights that it reads.

    It would map them: whoever wrote into a file of a running service, or cut it, would change its
    answers or end it.
    """
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})
    return core


def read_graphs(files: Mapping[Modality, Path]) -> dict[Modality, openvino.Model]:
    """The graphs in .xml files, each with its .bin beside it. Raises whatever OpenVINO raises."""
    core = reader()
    return {modality: core.read_model(file) for modality, file in files.items()}


def compiled(graphs: Mapping[Modality, openvino.Model], precision: str, views: int) -> Compiled:
    """Compile graphs that take normalised images.

    precision: "float32", "bfloat16", or "auto": OpenVINO takes bf16 where the CPU has units for it.
    views: the images of one crop. Raises whatever OpenVINO raises.
    """
    cores = allowed_cores()
    streams = min(cores, _MOST_STREAMS)
    core = openvino.Core()
    settings: dict[str, object] = {}
    if cores < len(os.sched_getaffinity(0)):  # by a quota, which OpenVINO does not ask for
        settings["INFERENCE_NUM_THREADS"] = cores
    if precision != "auto":
        settings[NUMBER_TYPE] = _PRECISIONS[precision]
    of_a_crop = {m: fixed_batch(_of_pixels(graph), views) for m, graph in graphs.items()}
    with ThreadPoolExecutor(cores, "compile") as threads:  # each takes one core

        def begun(**how: object) -> dict[Modality, Future[openvino.CompiledModel]]:
            return {
                modality: threads.submit(core.compile_model, graph, "CPU", settings | how)
                for modality, graph in of_a_crop.items()
            }

        lone, shared = begun(PERFORMANCE_HINT="LATENCY"), begun(NUM_STREAMS=streams)
    return Compiled(
        precision,
        views,
        {m: future.result() for m, future in lone.items()},
        {m: future.result() for m, future in shared.items()},
        streams,
    )


class GraphFiles:
    """A converted graph on the disk, and a digest of it that is written last.

    xml: what OpenVINO reads.
    """

    def __init__(self, folder: Path, fingerprint: str, modality: Modality) -> None:
        # Another OpenVINO may convert otherwise: its version is part of the name.
        version = "".join(c if c.isalnum() else "-" for c in openvino.__version__.split("-")[0])
        stem = folder / f"openvino-{version}-{fingerprint}-view-{modality}"
        self.xml, self._weights, self._digest = (
            stem.with_name(stem.name + suffix) for suffix in (".xml", ".bin", ".sha256")
        )

    def digest(self) -> str | None:
        """Of the files, where they are there, readable and as they were written; else None."""
        try:
            digest = _digest(self.xml, self._weights)
            return digest if self._digest.read_bytes() == digest.encode() else None
        except OSError:  # not there, not readable, or a folder
            return None

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
