"""Checkpoints: one .safetensors file, with its JSON (configuration, facts) in the file's metadata.

Nothing is unpickled. The fingerprint is a SHA-256 over the configuration and every stored tensor;
features in a gallery carry it, so that those of two checkpoints are never compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from model.cmt import CMT
from model.config import CMTConfig

FORMAT = "cmt-checkpoint"
VERSION = "1"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    fingerprint: SHA-256 (hex) over weights and configuration. training: facts of the run
    (dataset, identities, command, seed, evaluation). calibration: distance → probability, or None.
    """

    fingerprint: str
    config: CMTConfig
    training: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None


def save_checkpoint(
    path: Path | str,
    model: CMT,
    *,
    training: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> CheckpointInfo:
    """Write `model` to `path`, atomically (a crash leaves the old file), and return its info.

    dtype: of matrices and kernels, fp16 halves the file; vectors (norms, biases) stay fp32, since
    running variances do not fit fp16's range.
    Raises CheckpointError when a weight is not finite (in `dtype`).
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype if tensor.ndim > 1 else torch.float32)
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"weight {name} is not finite in {dtype}; nothing was written: go back to an "
                    "earlier checkpoint, or save in float32"
                )
        tensors[name] = tensor
    info = CheckpointInfo(
        fingerprint=_fingerprint(model.config, tensors),
        config=model.config,
        training=dict(training or {}),
        calibration=None if calibration is None else dict(calibration),
    )
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": info.fingerprint,
        "config": info.config.model_dump_json(),
        "training": json.dumps(info.training),
        "calibration": json.dumps(info.calibration),
    }
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(serialise(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return info


def load_checkpoint(
    path: Path | str, device: torch.device | str = "cpu"
) -> tuple[CMT, CheckpointInfo]:
    """Read a checkpoint → (the network in fp32 and eval mode on `device`, its info).

    Raises CheckpointError, one sentence with the remedy, for a missing, damaged or altered file, a
    file of another kind, or a version that this release does not read.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file but no CMT checkpoint; give a file that `cmt train` "
            "wrote"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {metadata.get('version')}, this release reads "
            f"{VERSION}; use the release that wrote it, or train again"
        )
    try:
        info = CheckpointInfo(
            fingerprint=metadata["fingerprint"],
            config=CMTConfig.model_validate_json(metadata["config"]),
            training=json.loads(metadata["training"]),
            calibration=json.loads(metadata["calibration"]),
        )
    except (KeyError, ValueError, ValidationError) as error:
        raise CheckpointError(
            f"{path} has unreadable metadata ({_first_line(error)}); fetch the file again"
        ) from error
    if _fingerprint(info.config, tensors) != info.fingerprint:
        raise CheckpointError(
            f"{path} does not match its fingerprint: it was altered or damaged; fetch it again"
        )
    model = CMT(info.config)
    try:
        model.load_state_dict(tensors)  # copies into the network's fp32 parameters
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} holds other weights than its configuration needs; fetch it again"
        ) from error
    return model.to(device).eval(), info


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give the path of a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({_first_line(error)}); fetch it again"
        ) from error


def _fingerprint(config: CMTConfig, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(config.model_dump(), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
