"""How this process's heap gives memory back."""

from __future__ import annotations

import ctypes
from contextlib import suppress

# The parameters' names in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 4 << 20  # a chunk of a gallery, a network's weights, an upload; no buffer of one query
_KEPT = 16 << 20  # free memory at a heap's end that is not given back, or calls would fault it in


def give_back_large_blocks() -> None:
    """Let every block of some megabytes go back to the system when it is freed.

    glibc does so only until the first one is freed: from then on such blocks lie among small ones,
    in a heap for each thread, where what is freed stays part of the process. A gallery whose rows
    come and go grew by a chunk with nearly every compaction. Does nothing under another C library.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, _KEPT)
