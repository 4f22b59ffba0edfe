"""A process that decodes images, one at a time, until the other end of its pipe closes.

It is started as `python -m service.images.worker DESCRIPTOR`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from model.preprocess import resize
from service.errors import ServiceError
from service.images.decode import Box, Crop, ImageLimits, decode
from service.images.protocol import FACTS, Order

# What decoding may use beyond the libraries. 20 million pixels of 16 bits need a tenth of it.
_MEMORY = 2 << 30


def main() -> None:
    """Serve the pipe whose descriptor is the first argument."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_mapped() + _MEMORY, hard))
    pipe = Connection(int(sys.argv[1]))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            order, data = Order(**json.loads(pipe.recv_bytes())), pipe.recv_bytes()
            # Unhandled, the alarm ends the process, even inside a codec that never returns.
            signal.setitimer(signal.ITIMER_REAL, order.seconds)
            answer = _work(order, data)
            signal.setitimer(signal.ITIMER_REAL, 0)
            for part in answer:
                pipe.send_bytes(part)


def _work(order: Order, data: bytes) -> Sequence[bytes]:
    try:
        crop = decode(
            data,
            modality=order.modality,
            polarity=order.polarity,
            box=None if order.box is None else Box(*order.box),
            limits=ImageLimits(*order.limits),
            sha256=order.sha256,
        )
    except ServiceError as error:
        return [json.dumps({"code": error.code, "detail": error.detail}).encode(), b"", b""]
    pixels = resize(crop.image, order.height, order.width)
    # Without a box the uploaded bytes are stored, which the service has.
    stored = b"" if order.box is None else crop.data
    return [json.dumps(_facts(crop)).encode(), pixels.tobytes(), stored]


def _facts(crop: Crop) -> dict[str, object]:
    return {name: getattr(crop, name) for name in FACTS}


def _mapped() -> int:
    """Address space in use, in bytes."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
