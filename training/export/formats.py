"""The file formats: write a graph, and run what was written."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.fixed_batch import IN_FP32_AT_ANY_SIZE
from model.graphs import Graph, to_openvino

# The newest that adds an operator for this network, Attention; it ran as fast as 18 and 20 in
# onnxruntime, which implements it since 1.23. The later ones change nothing that is used here.
OPSET = 23

Array = npt.NDArray[np.float32]
GraphRunner = Callable[[Array], list[Array]]  # a graph's input → its outputs, in their order


class Format(ABC):
    """A file format and the runtime that it is checked with.

    name: as `--format` and the reports say it.
    """

    name: str

    @abstractmethod
    def write(self, graph: Graph, folder: Path) -> list[Path]:
        """Convert `graph` into files of `folder` that begin with its name, and list them."""

    @abstractmethod
    def open(self, file: Path) -> GraphRunner:
        """Load the first of the files that `write` listed, to compute in fp32 on the CPU."""


class Onnx(Format):
    """One .onnx file, weights inside."""

    name = "onnx"

    def write(self, graph: Graph, folder: Path) -> list[Path]:
        import onnx
        import torch

        path = folder / f"{graph.name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own inner workings
            program = torch.onnx.export(
                graph.module,
                (graph.example,),
                dynamo=True,
                input_names=[graph.input],
                output_names=list(graph.outputs),
                dynamic_shapes=({0: torch.export.Dim("B")},),
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None
        program.save(str(path), external_data=False)
        onnx.checker.check_model(str(path), full_check=True)
        return [path]

    def open(self, file: Path) -> GraphRunner:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()

        def run(array: Array) -> list[Array]:
            outputs: list[Array] = session.run(None, {given.name: array})
            return outputs

        return run


class OpenVINO(Format):
    """An .xml file with the graph and a .bin file with its weights, in fp32."""

    name = "openvino"

    def write(self, graph: Graph, folder: Path) -> list[Path]:
        from model.quiet_openvino import openvino

        path = folder / f"{graph.name}.xml"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.jit, which OpenVINO traces with
            openvino.save_model(to_openvino(graph), path, compress_to_fp16=False)
        return [path, path.with_suffix(".bin")]

    def open(self, file: Path) -> GraphRunner:
        from model.quiet_openvino import openvino

        compiled = openvino.Core().compile_model(file, "CPU", IN_FP32_AT_ANY_SIZE)

        def run(array: Array) -> list[Array]:
            results = compiled(array)
            return [np.array(results[output]) for output in compiled.outputs]

        return run


FORMATS: dict[str, Format] = {known.name: known for known in (Onnx(), OpenVINO())}
