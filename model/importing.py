"""Importing much at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
