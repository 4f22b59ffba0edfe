"""Running out of memory, as the libraries in use report it."""

from __future__ import annotations

import re

from service.kit.device_loss import is_device_lost

_EXHAUSTED = re.compile(
    r"out[ _]of[ _]memory|can't allocate memory|bad_alloc"
    # Libraries of CUDA allocate by themselves, beside PyTorch.
    r"|_status_alloc_failed|_allocation_failed|cudaerrormemoryallocation"
    r"|cudnn.*workspace"
    # What PyTorch says when every algorithm of a convolution has failed for lack of a workspace.
    r"|unable to find (a valid cudnn algorithm to run|an engine to execute this)"
    # FAISS on a GPU.
    r"|failed to cuda(malloc|hostalloc)|standardgpuresources: (\w+ )?alloc fail"
    # PyTorch's allocator, where it wanted to say how full the GPU is and NVML did not answer.
    r"|nvml_success == .*cudacachingallocator",
    re.DOTALL,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory.

    By Python, PyTorch, OpenVINO, FAISS, Triton or a library of CUDA. An allocation that fails
    because the device is lost is none.
    """
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return _EXHAUSTED.search(str(error).lower()) is not None and not is_device_lost(error)
