"""OpenVINO without its telemetry. Import `openvino` from here only.

Its converter reports usage through the package `openvino_telemetry`, unasked and from separate
processes, and works without it where it cannot be imported.
"""

from __future__ import annotations

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino  # noqa: E402 (after the line above)

__all__ = ["openvino"]
