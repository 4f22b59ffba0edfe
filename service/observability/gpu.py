"""Memory and utilisation of the GPU in use, by NVIDIA's management library (NVML).

Read by nvidia-ml-py, which comes with the extra `gpu`. Without it, or without a driver, there are
no such metrics: they are absent, not 0.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch.cuda import get_device_properties

from service.observability.metrics import Metrics

log = logging.getLogger(__name__)


def watch_gpu(metrics: Metrics, device: str) -> bool:
    """Add the gauges of a GPU, whoever uses it → whether there are any.

    device: as torch names it. Those of a part of a GPU (MIG) are that part's.
    """
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        log.warning("no metrics of the GPU: nvidia-ml-py is missing; install the extra gpu")
        return False
    try:
        nvml.nvmlInit()
        gpu = _handle(nvml, device)
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
    try:
        nvml.nvmlDeviceGetUtilizationRates(gpu)
    except nvml.NVMLError_NotSupported:  # a part of a GPU has none
        return True
    except nvml.NVMLError:
        pass
    metrics.watch(
        "cmt_gpu_utilization_ratio",
        "Share of the last moment in which the GPU computed anything.",
        told(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
    )
    return True


def _handle(nvml: Any, device: str) -> Any:
    """NVML's handle of a device of torch. Raises NVMLError, RuntimeError or AssertionError.

    NVML has other numbers, for it also counts what CUDA_VISIBLE_DEVICES leaves out, but the same
    UUIDs.
    """
    names = list(_names(device))
    for name in names[:-1]:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:
            continue
    return nvml.nvmlDeviceGetHandleByUUID(names[-1])


def _names(device: str) -> Iterator[str]:
    """What a device may be called, the surest first."""
    number = torch.device(device).index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if number < len(visible) and visible[number].strip().startswith("MIG-"):
        yield visible[number].strip()
    uuid = get_device_properties(device).uuid
    yield f"MIG-{uuid}"
    yield f"GPU-{uuid}"
