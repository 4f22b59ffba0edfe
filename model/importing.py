"""Importing much at once."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


@contextmanager
def without_collections() -> Iterator[None]:
    """Look for no garbage while a block imports, and never again among what it leaves.

    Modules stay until the end, and looking through torch's again and again takes a quarter of the
    time to import it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def torch_library() -> Iterator[None]:
    """Load the largest of torch's libraries in a thread while a block imports something else.

    Python holds its lock while it loads a library; `dlopen` called as any function does not. Where
    that fails, `import torch` meets the same and says it.
    """
    found = find_spec("torch")
    if found is None or found.origin is None:
        yield
        return
    library = Path(found.origin).parent / "lib" / "libtorch_cpu.so"
    load = ctypes.CDLL(None).dlopen
    with ThreadPoolExecutor(1, "torch") as thread:
        thread.submit(load, os.fsencode(library), os.RTLD_NOW | os.RTLD_LOCAL)
        yield
