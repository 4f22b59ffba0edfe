"""What somebody writes first: FastAPI, Pillow, the model called for each request.

It runs the service's own Embedder, in the same runtime, and does strictly less than the service: no
limits, no checks, no detection of the modality, no batches, nothing stored or searched. It is
started as `python -m service.bench.serving.naive CHECKPOINT DEVICE RUNTIME PORT`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, Any

import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image

from service.bench.serving.load import HOST
from service.embedder import Embedder
from service.images import Crop


def create_app(embedder: Embedder) -> FastAPI:
    """One route, which answers the norm of an upload's features."""
    app = FastAPI()

    @app.post("/embed")
    def embed(image: UploadFile) -> dict[str, float]:
        return {"norm": float(embedder.embed([plain_crop(image.file)]).norm())}

    return app


def plain_crop(file: IO[Any]) -> Crop:
    """An upload as it is, taken for infrared: what the network needs, and nothing found out."""
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
    checkpoint, device, runtime, port = sys.argv[1:]
    embedder = Embedder(Path(checkpoint), device, runtime)  # type: ignore[arg-type]
    uvicorn.run(create_app(embedder), host=HOST, port=int(port), access_log=False)


if __name__ == "__main__":
    main()
