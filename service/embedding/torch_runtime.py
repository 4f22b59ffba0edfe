"""The network on PyTorch, on a CPU or a GPU."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from model import CMT, Modality
from model.pixels import normalise
from model.precision import Precision


class TorchBackend:
    """Pixels B×H×W×3 (uint8) of one modality → B×P×D in fp32. Thread-safe.

    Channels last, under autocast where that is faster.
    """

    streams = 1

    def __init__(self, model: CMT, device: str, precision: Precision) -> None:
        # Converts in place; only convolution kernels change their memory order.
        self._model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device, self._precision = torch.device(device), precision

    def __call__(self, pixels: Tensor, modality: Modality) -> Tensor:
        return self._embed(pixels, modality)

    def _embed(self, pixels: Tensor, modality: Modality) -> Tensor:
        """Pixels on the device → features there."""
        # Permuted pixels keep their memory order, which is channels last.
        images = normalise(pixels.permute(0, 3, 1, 2))
        autocast = (
            torch.autocast(self._device.type, self._precision.dtype)
            if self._precision.autocast
            else nullcontext()
        )
        with autocast:
            features: Tensor = self._model.embed(images, modality)
        return features.float()


class GpuBackend(TorchBackend):
    """The same on a GPU, on a stream of its own, which searches do not wait for.

    Copies are asynchronous and from pinned memory: while the GPU works on one thread's batch,
    another thread prepares and queues the next one.
    """

    def __init__(self, model: CMT, device: str, precision: Precision) -> None:
        super().__init__(model, device, precision)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # The weights come from the other stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def __call__(self, pixels: Tensor, modality: Modality) -> Tensor:
        with torch.cuda.stream(self._stream):
            there = pixels.pin_memory().to(self._device, non_blocking=True)
            features = self._embed(there, modality)
            here = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            here.copy_(features, non_blocking=True)
            # Of this batch alone, and without a core that spins.
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        done.synchronize()
        return here
