"""What libraries say of a GPU that is full or lost, and of neither."""

from __future__ import annotations

import pytest
import torch

from service.kit.device_loss import is_device_lost, on_device_loss, report_loss
from service.kit.memory import is_out_of_memory
from tests.faked_device import FakedDevice

HELP = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
FAISS = (
    "Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory(const "
    "faiss::gpu::AllocRequest&) at /faiss/gpu/StandardGpuResources.cpp:452: Error: 'err == "
    "cudaSuccess' failed: StandardGpuResources: alloc fail type TemporaryMemoryOverflow dev 0 "
    "space Device stream 0x7effcc5f47a0 size 4513349632 bytes (cudaMalloc error {})"
)

FULL = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total"),
    torch.AcceleratorError(f"CUDA error: out of memory{HELP}"),
    *map(
        RuntimeError,
        (
            "[enforce fail] DefaultCPUAllocator: can't allocate memory",
            "std::bad_alloc",
            "std::bad_alloc: out_of_memory: CUDA error at: /rmm/cuda_async_memory_resource.hpp",
            "CUDA driver error: out of memory",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
            "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
            "cuDNN Frontend error: the workspace of the plan could not be allocated",
            "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
            "Unable to find a valid cuDNN algorithm to run convolution",
            "GET was unable to find an engine to execute this computation",
            "NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at "
            '"/pytorch/c10/cuda/CUDACachingAllocator.cpp":1123, please report a bug to PyTorch.',
            FAISS.format("out of memory [2]"),
            "Error: 'err == cudaSuccess' failed: Failed to cudaMalloc 1610612736 bytes on device 0 "
            "(error 2 out of memory)",
            "Triton Error [CUDA]: out of memory",
        ),
    ),
]

LOST = [
    *map(
        torch.AcceleratorError,
        (
            f"CUDA error: {told}{HELP}"
            for told in (
                "an illegal memory access was encountered",
                "device-side assert triggered",
                "unspecified launch failure",
                "uncorrectable ECC error encountered",
                "uncorrectable NVLink error detected during the execution",
                "the launch timed out and was terminated",
                "misaligned address",
                "an illegal instruction was encountered",
                "hardware stack error",
                "invalid program counter",
                "operation not supported on global/shared address space",
                "context is destroyed",
                "unknown error",
            )
        ),
    ),
    *map(
        RuntimeError,
        (
            "Triton Error [CUDA]: an illegal memory access was encountered",
            "Triton Error [CUDA]: unknown error",
            "CUDA driver error: unknown error",
            "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa)`",
            "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
            "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDA_DRIVER",
            FAISS.format("an illegal memory access was encountered [700]"),
            "Error: 'err == cudaSuccess' failed: Failed to cudaFree pointer 0x7f0ec0000000 (error "
            "999 unknown error)",
            "NVML_SUCCESS == r INTERNAL ASSERT FAILED: GPU is lost",
        ),
    ),
]

NEITHER = [
    RuntimeError("shapes cannot be multiplied"),
    ValueError("out of memory"),
    ValueError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu!"),
    torch.AcceleratorError(f"CUDA error: invalid argument{HELP}"),
    torch.AcceleratorError(f"CUDA error: invalid device ordinal{HELP}"),
    torch.AcceleratorError(f"CUDA error: invalid configuration argument{HELP}"),
    torch.AcceleratorError(f"CUDA error: too many resources requested for launch{HELP}"),
    torch.AcceleratorError(f"CUDA error: no kernel image is available for execution{HELP}"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm( handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    RuntimeError("an unknown error"),
]


def short(error: Exception) -> str:
    return str(error)[-70:] or type(error).__name__


@pytest.mark.parametrize("error", FULL, ids=short)
def test_a_full_device_is_told_from_a_lost_one(error: Exception) -> None:
    assert (is_out_of_memory(error), is_device_lost(error)) == (True, False)


@pytest.mark.parametrize("error", LOST, ids=short)
def test_a_lost_device_is_told_from_a_full_one(error: Exception) -> None:
    assert (is_out_of_memory(error), is_device_lost(error)) == (False, True)


@pytest.mark.parametrize("error", NEITHER, ids=short)
def test_other_errors_are_neither(error: Exception) -> None:
    assert (is_out_of_memory(error), is_device_lost(error)) == (False, False)


@pytest.mark.parametrize(("code", "lost"), [(700, True), (719, True), (214, True), (1, False)])
def test_the_code_of_an_error_counts_in_any_words(code: int, lost: bool) -> None:
    error = torch.AcceleratorError("CUDA error: in words of a later release")
    error.error_code = code  # type: ignore[attr-defined]
    assert is_device_lost(error) == lost


def test_a_kernel_that_did_not_run_on_a_device_that_answers_is_no_loss(
    faked: FakedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
    used = torch.zeros(1, device="cuda")
    assert not is_device_lost(failed)

    def lost(_: int) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert is_device_lost(failed)
    del used


def test_what_follows_from_a_loss_or_comes_with_it_is_one_too() -> None:
    loss = RuntimeError("CUDA error: unspecified launch failure")
    follows = LookupError("the row that was computed")
    follows.__context__ = loss
    assert is_device_lost(follows)
    assert is_device_lost(ExceptionGroup("tasks", [ValueError(), ExceptionGroup("", [loss])]))


def test_everybody_who_wants_to_know_is_told_of_the_first_loss() -> None:
    first: list[str] = []
    second: list[str] = []
    with on_device_loss(first.append), on_device_loss(second.append):
        assert not report_loss(RuntimeError("CUDA out of memory"))
        assert (first, second) == ([], [])
        assert report_loss(RuntimeError("CUDA error: misaligned address\nmore"))
        assert report_loss(RuntimeError("CUDA error: device-side assert triggered"))
    assert first == second == ["CUDA error: misaligned address"]
    assert report_loss(RuntimeError("CUDA error: misaligned address"))  # nobody listens any more
