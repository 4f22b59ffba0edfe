"""The messages between the service and its decoding processes.

A process says `READY` once it has started. For every image it is sent an `Order` as JSON and the
image's bytes. It answers with a JSON object (`FACTS` of the crop, or `code` and `detail` of an
error, and the seconds that it computed), the pixels and the bytes to store, none where they are
those that were sent: nothing that the service would have to unpickle, even from a process that an
image has taken over. Each goes over a socket in as few system calls as there can be, since a small
crop costs little more than these.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from socket import socket

from model.pictures import Polarity
from service.images.decode import ModalityChoice

READY = b"ready"

_AT_ONCE = 1 << 17  # bytes that are read first: a crop of the usual size is whole then

FACTS = (
    "modality",
    "modality_source",
    "polarity",
    "width",
    "height",
    "bit_depth",
    "sha256",
    "media_type",
)


@dataclass(frozen=True)
class Order:
    """How to decode one image.

    height, width: of the picture to answer. seconds: how long it may compute. keep_metadata:
    whether the bytes to store keep EXIF and the like. sha256: of the image's bytes, so that it is
    not computed a second time.
    """

    modality: ModalityChoice
    polarity: Polarity
    box: tuple[int, int, int, int] | None
    limits: tuple[int, int, int, int, bool]
    height: int
    width: int
    seconds: float
    keep_metadata: bool
    sha256: str


class Wire:
    """One end of the socket. A message has parts of any length; both ends know how many."""

    def __init__(self, end: socket) -> None:
        self.end = end

    def send(self, *parts: bytes) -> None:
        """Send one message. Raises OSError."""
        pieces = [struct.pack(f"<{len(parts)}Q", *map(len, parts)), *parts]
        sent = self.end.sendmsg(pieces)
        if sent < sum(map(len, pieces)):
            self.end.sendall(memoryview(b"".join(pieces))[sent:])

    def receive(self, count: int) -> list[bytes]:
        """Wait for one message of `count` parts. Raises EOFError and OSError.

        The other end sends nothing further before it has an answer.
        """
        head = 8 * count
        received = self._some()
        while len(received) < head:
            received += self._some()
        lengths = struct.unpack_from(f"<{count}Q", received)
        whole = memoryview(bytearray(head + sum(lengths)))
        place = len(received)
        whole[:place] = received
        while place < len(whole):
            more = self.end.recv_into(whole[place:])
            if not more:
                raise EOFError
            place += more
        parts, start = [], head
        for length in lengths:
            parts.append(bytes(whole[start : start + length]))
            start += length
        return parts

    def _some(self) -> bytes:
        received = self.end.recv(_AT_ONCE)
        if not received:
            raise EOFError
        return received
