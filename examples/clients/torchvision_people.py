"""A detector for videos.py from torchvision's models and a file of their weights, on the CPU.

    python examples/clients/videos.py recordings --detector torchvision_people:people \\
        --weights fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth

Nothing is downloaded. The file keeps the name under which torchvision publishes it, since that says
which network it is for. Mind the licence of the weights and of what they were trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from model.torchvision_compat import extension_loads

PERSON = 1  # among the labels of COCO
SURE = 0.7  # least score of a box

Detector = Callable[[Image.Image], list[tuple[float, float, float, float]]]


def people(weights: Path) -> Detector:
    """Load the network → a function from a frame to its boxes (x, y, width, height)."""
    if not extension_loads():
        raise RuntimeError(
            "torchvision is built for another torch, such as CUDA's beside that for the CPU; "
            "install both from one index"
        )
    from torchvision.models import get_model
    from torchvision.transforms.functional import to_tensor

    name = weights.stem.split("-")[0].removesuffix("_coco")
    network = get_model(name, weights=None, weights_backbone=None)
    network.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    network.eval()

    def detect(frame: Image.Image) -> list[tuple[float, float, float, float]]:
        with torch.inference_mode():
            [found] = network([to_tensor(frame.convert("RGB"))])
        kept = (found["labels"] == PERSON) & (found["scores"] >= SURE)
        return [
            (left, top, right - left, bottom - top)
            for left, top, right, bottom in found["boxes"][kept].tolist()
        ]

    return detect
