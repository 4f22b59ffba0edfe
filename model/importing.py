"""Importing much at once."""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, ModuleType


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


@contextmanager
def frames_known_by_name() -> Iterator[None]:
    """While a block imports torch, take the module of a frame by the name that the frame has.

    torch asks for it a hundred times, and `inspect` resolves the path of every module for that.
    """
    usual = inspect.getmodule

    def getmodule(object: object, _filename: str | None = None) -> ModuleType | None:
        if isinstance(object, FrameType):
            return sys.modules.get(str(object.f_globals.get("__name__")))
        return usual(object, _filename)

    inspect.getmodule = getmodule
    try:
        yield
    finally:
        inspect.getmodule = usual
