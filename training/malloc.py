"""glibc's malloc, told to keep large blocks.

A training step on a CPU allocates and frees the same large activations again and again. By default
glibc hands them back to the system each time and faults them in anew.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_large_blocks() -> bool:
    """Serve large blocks from the heap and never trim it; False where the C library cannot."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    largest = 2**31 - 1
    return all(
        mallopt(parameter, value) == 1
        for parameter, value in (
            (_M_MMAP_THRESHOLD, largest),
            (_M_TRIM_THRESHOLD, largest),
            (_M_TOP_PAD, 64 << 20),
        )
    )
