"""The obvious server: FastAPI, Pillow, the model called for each request, PyTorch to rank.

It runs the service's own Embedder, in the same runtime, and does strictly less than the service:
no limits, no checks, no detection of the modality, no batches, nothing stored. What it ranks are
random features in memory. It is started as
`python -m service.bench.serving.naive CHECKPOINT DEVICE RUNTIME GALLERY PORT`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, Any

import torch
import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image

from model import Modulation
from service.bench.paper import modulated_distances
from service.bench.serving.load import HOST
from service.embedding.embedder import Embedder
from service.images.decode import Crop

_TOP = 20  # as many as the service answers by default


def create_app(embedder: Embedder, gallery: int) -> FastAPI:
    """A route that answers the norm of an upload's features, and one that ranks `gallery` rows."""
    app = FastAPI()
    config = embedder.info.config
    y = torch.randn(gallery, config.parts, config.dim).to(embedder.device)

    @app.post("/embed")
    def embed(image: UploadFile) -> dict[str, float]:
        return {"norm": float(embedder.embed([plain_crop(image.file)]).norm())}

    @app.post("/rank")
    @torch.inference_mode()
    def rank(image: UploadFile) -> list[dict[str, float]]:
        x = embedder.embed([plain_crop(image.file)])
        gamma, beta = (parameter.to(y.device) for parameter in embedder.modulation(x))
        squared = modulated_distances(x.to(y.device), y, Modulation(gamma, beta))[0]
        best = squared.topk(min(_TOP, gallery), largest=False)
        rows = zip(best.indices.tolist(), best.values.sqrt().tolist(), strict=True)
        return [{"id": place, "distance": distance} for place, distance in rows]

    return app


def plain_crop(file: IO[Any]) -> Crop:
    """An upload, assumed to be infrared: only what the network needs, without detection."""
    image = Image.open(file).convert("RGB")
    return Crop(
        image=image,
        modality="ir",
        modality_source="given",
        width=image.width,
        height=image.height,
        bit_depth=8,
        sha256="",
        data=b"",
        media_type="",
    )


def main() -> None:
    """Serve until a signal."""
    checkpoint, device, runtime, gallery, port = sys.argv[1:]
    embedder = Embedder(Path(checkpoint), device, runtime)  # type: ignore[arg-type]
    uvicorn.run(create_app(embedder, int(gallery)), host=HOST, port=int(port), access_log=False)


if __name__ == "__main__":
    main()
