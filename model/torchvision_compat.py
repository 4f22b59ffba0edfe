"""`import torchvision` on a CPU-only PyTorch.

PyPI's torchvision wheel is linked against CUDA. With a CPU-only torch its extension does not
load, and its Python side then fails with "operator torchvision::nms does not exist" while it
registers fake kernels for two operators. Declaring their schemas first lets `models` and
`transforms` import; they use neither. Where the extension loads, the real operators stay.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# torch.library drops definitions with their Library object: keep it as long as the module.
_library: torch.library.Library | None = None


def extension_loads() -> bool:
    """Whether torchvision's compiled extension loads with the installed torch.

    Raises ImportError where torchvision is not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError(
            "torchvision is not installed; install it with `pip install -c constraints.txt "
            "torchvision`"
        )
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            ctypes.CDLL(str(extension))
        except OSError:
            return False
        return True
    return False


def prepare() -> bool:
    """Make `import torchvision` work → whether the operator schemas had to be declared.

    Does nothing where torch has CUDA or where torchvision's own extension loads. Raises ImportError
    where torchvision is not installed.
    """
    global _library
    if _library is not None:
        return True
    if torch.version.cuda is not None or extension_loads():
        return False
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _library = library
    return True
