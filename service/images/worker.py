"""A process that decodes images, one at a time, until the other end of its socket closes.

It is started as `python -m service.images.worker DESCRIPTOR`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from contextlib import suppress
from socket import socket
from typing import Any

from model.pixels import resize
from service.errors import ImageTooLarge, ServiceError
from service.images.decode import Box, ImageLimits, decode
from service.images.protocol import FACTS, READY, Order, Wire

# What decoding may use beyond the libraries. 20 million pixels of 16 bits need a tenth of it.
_MEMORY = 2 << 30


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_mapped() + _MEMORY, hard))
    wire = Wire(socket(fileno=int(sys.argv[1])))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the service has ended
        wire.send(READY)
        while True:
            written, data = wire.receive(2)
            order = Order(**json.loads(written))
            # Unhandled, the alarm ends the process, even inside a codec that never returns. It
            # counts computing, so that a busy machine does not make an image too slow.
            signal.setitimer(signal.ITIMER_PROF, order.seconds)
            # Of the only thread: the kernel counts a process's time in ticks while an alarm is set.
            begun = time.thread_time()
            facts, pixels, stored = _work(order, data)
            facts["seconds"] = time.thread_time() - begun
            signal.setitimer(signal.ITIMER_PROF, 0)
            wire.send(json.dumps(facts).encode(), pixels, stored)


def _work(order: Order, data: bytes) -> tuple[dict[str, Any], bytes, bytes]:
    """Facts, pixels, and the bytes to store where they are not those that were sent."""
    try:
        crop = decode(
            data,
            modality=order.modality,
            polarity=order.polarity,
            box=None if order.box is None else Box(*order.box),
            limits=ImageLimits(*order.limits),
            keep_metadata=order.keep_metadata,
            sha256=order.sha256,
        )
        pixels = resize(crop.image, order.height, order.width).tobytes()
    except ServiceError as error:
        return {"code": error.code, "detail": error.detail}, b"", b""
    except MemoryError:  # more than RLIMIT_AS allows; what the machine lacks is a signal instead
        detail = "the image needs too much memory to decode; send a smaller crop"
        return {"code": ImageTooLarge.code, "detail": detail}, b"", b""
    stored = b"" if crop.data is data else crop.data
    return {name: getattr(crop, name) for name in FACTS}, pixels, stored


def _mapped() -> int:
    """Address space in use, in bytes."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
