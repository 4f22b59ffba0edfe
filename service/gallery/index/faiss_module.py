"""FAISS; where it is not installed, what says so once it is needed.

A gallery on a GPU whose rows are all multiplied does without, as `make gpu-check` may have to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Missing:
    def __getattr__(self, name: str) -> Any:
        raise ModuleNotFoundError("No module named 'faiss'", name="faiss")


faiss: Any
try:
    import faiss
except ModuleNotFoundError:
    faiss = _Missing()


def version() -> str | None:
    """Of FAISS; None where it is not installed."""
    return None if isinstance(faiss, _Missing) else str(faiss.__version__)


def halve_threads() -> None:
    """Let FAISS use half of the cores on the calling thread."""
    if version() is not None:
        faiss.omp_set_num_threads(max(1, faiss.omp_get_max_threads() // 2))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let FAISS and PyTorch, which share their threads, compute on the calling thread alone."""
    if version() is None:
        yield
        return
    usual = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(usual)
