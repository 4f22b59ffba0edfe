"""What a checkpoint says of itself, read without its weights and without torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open


def stored_fingerprint(path: Path) -> str | None:
    """The fingerprint that a file says it has, without reading its weights; None if it says none.

    `load_checkpoint` checks whether that is true.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    fingerprint: str | None = metadata.get("fingerprint")
    return fingerprint
