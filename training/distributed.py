"""Several processes, one per GPU, that train as one: started by torchrun, DDP with global losses.

    torchrun --nproc-per-node 4 --no-python -- cmt train …

How the losses stay those of one process:

- Every process draws the same global batch (a pure function of seed and step) and takes whole
  identities of it, both modalities; augmentation is drawn for the global batch as well.
- Batch norm uses the statistics of the global batch: torch's SyncBatchNorm on GPUs,
  `GlobalBatchNorm` on a CPU.
- Outputs of all processes are put together in the global batch's order (`Share.gather`), so that
  centres, batch-hard mining and L_mod see every image, and every process computes the same loss L.
- Gradients: the backward of gathering sums over the processes' equal losses, which is W times the
  gradient of L for W processes; DDP averages over processes and takes the factor W away. Of
  weights that are applied after gathering (classifiers, g_γ, g_β) every process has the whole
  gradient, and the average leaves it.

What remains different is rounding, and dropout, which every process draws for itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.device import chosen_device

# The others wait while the first process decodes a data set or validates.
_PATIENCE = timedelta(hours=4)

T = TypeVar("T")


class Share(NamedTuple):
    """The part of a global batch of `total` images that this process computes: rows of it."""

    rows: np.ndarray
    total: int

    def gather(self, local: Tensor) -> Tensor:
        """This process's rows of a tensor → all rows, in global order; differentiable."""
        if count() == 1:
            return local
        rows = torch.from_numpy(self.rows).to(local.device)
        zeros = local.new_zeros(self.total, *local.shape[1:])
        return _sum(zeros.index_copy(0, rows, local))


def share_of(identities: int, images: int) -> Share:
    """Of a batch of N identities × K images, visible then infrared, this process's identities.

    N must be a multiple of the number of processes.
    """
    mine = np.arange(identities) // (identities // count()) == rank()
    return Share(np.flatnonzero(np.tile(np.repeat(mine, images), 2)), 2 * identities * images)


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes files, prints and validates."""
    return rank() == 0


def agreed(value: T) -> T:
    """The first process's value, in every process (what was measured may differ among them)."""
    if count() == 1:
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    chosen: T = values[0]
    return chosen


@contextmanager
def first_process_first() -> Iterator[None]:
    """The others run the block when the first process has left it (and find its files there)."""
    if count() > 1 and not is_first():
        distributed.barrier()
    yield
    if count() > 1 and is_first():
        distributed.barrier()


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did → this process's device.

    device: "cpu" or "cuda"; with several processes each takes the GPU of its number.
    Raises DeviceError where there is none of that number.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device == "cuda":
        device = chosen_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    yield device
    # Not after an error: the others may be waiting for this process, and torchrun ends them.
    distributed.destroy_process_group()


def use_global_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Replace every batch norm by one over all processes, with the same weights and names.

    Does nothing in one process.
    """
    if count() == 1:
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                new = GlobalBatchNorm(child.num_features, child.eps, child.momentum)
                new.load_state_dict(child.state_dict())
                setattr(parent, name, new)


def parallel(module: nn.Module) -> nn.Module:
    """`module` under DDP where there are several processes."""
    if count() == 1:
        return module
    # A stage may leave a module without gradient (λ = 0). Batch norm's buffers are equal already.
    return nn.parallel.DistributedDataParallel(
        module, find_unused_parameters=True, broadcast_buffers=False
    )


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the equally large batches of all processes, on any backend: B×C×…"""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the statistics of the global batch, or in eval mode by the running ones."""
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        number = input.numel() // input.shape[1] * count()
        mean = _sum(input.sum(axes)) / number  # C
        centred = input - mean.view(shape)
        variance = _sum(centred.square().sum(axes)) / number
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            unbiased = variance * number / (number - 1)
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(unbiased, self.momentum)  # type: ignore[union-attr, arg-type]
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


def _sum(tensor: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
    return total
