"""OpenVINO graphs for batches of one size, which is what several threads may compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

ANY_SIZE = -1
# Left to itself OpenVINO computes in bf16 on a CPU that has units for it.
NUMBER_TYPE = "INFERENCE_PRECISION_HINT"
IN_FP32 = {NUMBER_TYPE: "f32"}
IN_FP32_AT_ANY_SIZE = IN_FP32 | {"INFERENCE_NUM_THREADS": 1}  # see fixed_batch


def fixed_batch(graph: openvino.Model, size: int) -> openvino.Model:
    """A copy of a graph with one input, for batches of `size`; ANY_SIZE leaves it open.

    Where the size is open, OpenVINO 2026.4 works out shapes in one thread and makes kernels in
    another, and both write into one cache without a lock: now and then the process ended with a
    segmentation fault when such a graph was freed. Compile with a fixed size, or for one thread
    (INFERENCE_NUM_THREADS), which takes turns.
    """
    copied = graph.clone()
    _, *others = copied.input().partial_shape
    copied.reshape([size, *others])
    return copied
