"""The naive server's embedding route in LitServe, with its dynamic batching.

Decoding is in the process that embeds, as LitServe's users write it. It is started as
`python -m service.bench.serving.batching CHECKPOINT DEVICE RUNTIME PORT`.
"""

# No `from __future__ import annotations` here: LitServe compares the annotations themselves.
import sys
from collections.abc import Sequence
from pathlib import Path

import litserve
from starlette.requests import Request

from service.bench.serving.load import HOST
from service.bench.serving.naive import plain_crop
from service.embedding.embedder import Embedder
from service.images.decode import Crop

MAX_BATCH = 32
# LitServe waits this long for others before every batch, even with one client. Of 1 and 5 ms this
# served one client faster and 32 about equally: those wait during the previous batch anyway.
BATCH_TIMEOUT = 0.001


class EmbeddingAPI(litserve.LitAPI):  # type: ignore[misc]
    """Uploads → the norms of their features. Made in one process, set up in another."""

    def __init__(self, checkpoint: Path, runtime: str) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT, api_path="/embed")
        self._checkpoint, self._runtime = checkpoint, runtime

    def setup(self, device: str) -> None:
        """Load the checkpoint; device: "cpu", or "cuda:0" and so on."""
        self._embedder = Embedder(self._checkpoint, device, self._runtime)  # type: ignore[arg-type]

    def decode_request(self, request: Request) -> Crop:
        """The form's part `image`."""
        return plain_crop(request["image"].file)

    def predict(self, crops: Sequence[Crop]) -> list[float]:
        """One batch."""
        norms: list[float] = self._embedder.embed(crops).flatten(1).norm(dim=1).tolist()
        return norms

    def encode_response(self, norm: float) -> dict[str, float]:
        """The same answer as the naive server's."""
        return {"norm": norm}


def main() -> None:
    """Serve until a signal."""
    checkpoint, device, runtime, port = sys.argv[1:]
    kind, _, number = device.partition(":")
    server = litserve.LitServer(
        EmbeddingAPI(Path(checkpoint), runtime),
        accelerator=kind,
        devices=[int(number)] if number else 1,
        timeout=False,
    )
    server.run(host=HOST, port=int(port), log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
