"""Memory and utilisation of the GPU in use, by NVIDIA's management library (NVML).

Read by nvidia-ml-py, which comes with the extra `gpu`. Without it, or without a driver, there are
no such metrics: they are absent, not 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch.cuda import get_device_properties

from service.observability.metrics import Metrics

log = logging.getLogger(__name__)


def watch_gpu(metrics: Metrics, device: str) -> bool:
    """Add the gauges of a GPU, whoever uses it → whether there are any.

    device: as torch names it. NVML has other numbers, for it also counts what CUDA_VISIBLE_DEVICES
    leaves out; both know the same UUID.
    """
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        log.warning("no metrics of the GPU: nvidia-ml-py is missing; install the extra gpu")
        return False
    try:
        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetMemoryInfo(gpu)
    except (nvml.NVMLError, RuntimeError, AssertionError) as error:  # torch built without CUDA
        log.warning("no metrics of the GPU: %s", error)
        return False

    def told(value: Callable[[], float]) -> Callable[[], float]:
        """The value, or not a number where the driver does not say it (any more)."""

        def read() -> float:
            try:
                return value()
            except nvml.NVMLError:
                return float("nan")

        return read

    metrics.watch(
        "cmt_gpu_memory_used_bytes",
        "Memory of the GPU that is in use, by any process.",
        told(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used),
    )
    metrics.watch(
        "cmt_gpu_memory_total_bytes",
        "Memory of the GPU.",
        told(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).total),
    )
    metrics.watch(
        "cmt_gpu_utilization_ratio",
        "Share of the last moment in which the GPU computed anything.",
        told(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
    )
    return True
