"""A device that this process has lost: how libraries tell, and who has to know.

After some errors every further call to a GPU fails until the process starts again. They arise
wherever something is computed, in requests and in threads of their own; whoever meets one reports
it here, and the server, which alone can end the process, is told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

# CUDA's own documentation says of these that the process must be started again, or that the device
# or its link is broken. 999 is what a GPU gives that has fallen off the bus.
_LOST_CODES = frozenset(
    {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999}
)
# The same in words, as PyTorch, Triton, FAISS and cuVS pass them on.
_LOST = re.compile(
    r"uncorrectable (ecc|nvlink) error|illegal memory access|launch timed out and was terminated"
    r"|context is destroyed|device-side assert|hardware stack error|illegal instruction was"
    r"|misaligned address|operation not supported on global/shared address space"
    r"|invalid program counter|unspecified launch failure|cuda error:? (999 )?unknown error"
    r"|cuda driver error: unknown error|\[cuda\]: unknown error|\(error 999 |error unknown error"
    r"|gpu is lost|fallen off the bus"
)
# A kernel did not run: mostly because of one of those errors, seldom for lack of memory.
_FAILED = re.compile(r"(cublas|cudnn|cusolver|cusparse)_status_execution_failed")

LOST = "the GPU is lost for this process, which ends to be started again; try again then"

_listeners: list[Callable[[str], None]] = []


def is_device_lost(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that the device is gone for this process."""
    return _cause_of_loss(error) is not None


def report_loss(error: BaseException) -> bool:
    """Whether the device is lost by this error. Each listener is told of the first one."""
    cause = _cause_of_loss(error)
    if cause is None:
        return False
    told = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    with suppress(IndexError):  # another thread was faster
        while True:
            _listeners.pop()(told)
    return True


@contextmanager
def on_device_loss(tell: Callable[[str], None]) -> Iterator[None]:
    """Call `tell` once, with the library's words and in any thread, if a loss is reported."""
    _listeners.append(tell)
    try:
        yield
    finally:
        with suppress(ValueError):  # it has been told
            _listeners.remove(tell)


def _cause_of_loss(error: BaseException) -> BaseException | None:
    return next((one for one in _behind(error) if _says_lost(one)), None)


def _behind(error: BaseException) -> Iterator[BaseException]:
    """The error, those of its group, and what was being raised or handled when it arose."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        left += [*(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
        left += [one.__cause__, one.__context__]


def _says_lost(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):  # as PyTorch's, Triton's and FAISS's are
        return False
    if getattr(error, "error_code", None) in _LOST_CODES:  # of torch.AcceleratorError
        return True
    text = str(error).lower()
    return _LOST.search(text) is not None or (
        _FAILED.search(text) is not None and not _devices_answer()
    )


def _devices_answer() -> bool:
    """Whether the GPUs that this process uses still do anything; False without any."""
    used = [i for i in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(i)]
    try:
        for number in used:
            torch.cuda.synchronize(number)
    except RuntimeError:
        return False
    return bool(used)
