"""OpenVINO as we import it: without its reports of use to its makers.

Its converter sends them through the package `openvino_telemetry`, unasked and from processes of
their own, and does without where that cannot be imported. Import `openvino` from here only.
"""

from __future__ import annotations

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino  # noqa: E402 (after the line above)

__all__ = ["openvino"]
