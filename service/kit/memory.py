"""Running out of memory, as the libraries in use report it."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory: by Python, PyTorch, OpenVINO or FAISS."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "bad_alloc" in text
    )
