"""How soon replicas follow each other, and what counting requests for all of them costs.

    python -m scripts.measure_replicas --database-url postgresql+psycopg://… [--json FILE]

The database must be empty; give a pooler's address, and the same is measured by looking every
`POLL` seconds instead of by LISTEN. Galleries of random features in one process; only their
connections and threads are those of replicas.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from model import CheckpointInfo, CMTConfig
from model.machine import machine
from service.gallery import Gallery, NewItem
from service.images.decode import decode

_INFO = CheckpointInfo("0" * 64, CMTConfig(parts=2, dim=16, heads=2))
_PAUSE = 0.31  # seconds between two writes, so that they meet each part of a look's period
_LIMITS = [(10**6, 60)]


def main() -> None:
    """Measure, and print as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database-url", required=True)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--writes", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        galleries = [
            stack.enter_context(
                closing(
                    Gallery.open(
                        Path(folder) / str(number), _INFO, database_url=options.database_url
                    )
                )
            )
            for number in range(options.replicas)
        ]
        found = _measured(galleries, options.writes) | {"machine": machine()}
    text = json.dumps(found, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


def _measured(galleries: list[Gallery], writes: int) -> dict[str, Any]:
    first, *others = galleries
    replicas = [gallery.replicas for gallery in galleries]
    while not all(one is not None and one.others == len(others) for one in replicas):
        time.sleep(0.1)
    crop = decode(_picture())
    enrolled, erased, counted = [], [], []
    for number in range(writes):
        y = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(number))
        [item] = first.add([NewItem(crop)], y)
        enrolled.append(_seconds_until(lambda: all(g.statistics.items == 1 for g in others)))
        time.sleep(_PAUSE)
        first.delete(item.id)
        erased.append(_seconds_until(lambda: all(g.statistics.items == 0 for g in others)))
        time.sleep(_PAUSE)
    for number in range(10 * writes):
        replica = replicas[number % len(replicas)]
        assert replica is not None
        started = time.perf_counter()
        replica.count_request("key:some", "many", _LIMITS)
        counted.append(time.perf_counter() - started)
    return {
        "replicas": len(galleries),
        "listening": [one is not None and one.listens for one in replicas],
        "enrolled here, found everywhere": _spread(enrolled),
        "deleted here, gone everywhere": _spread(erased),
        "one request counted for all": _spread(counted),
    }


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 32)).save(buffer, "PNG")
    return buffer.getvalue()


def _seconds_until(condition: Callable[[], bool]) -> float:
    """Seconds from an acknowledgement until then."""
    started = time.perf_counter()
    while not condition():
        time.sleep(0.001)
    return time.perf_counter() - started


def _spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    return {
        "median ms": round(1000 * median(seconds), 2),
        "p99 ms": round(1000 * float(np.percentile(seconds, 99)), 2),
        "max ms": round(1000 * max(seconds), 2),
    }


if __name__ == "__main__":
    main()
