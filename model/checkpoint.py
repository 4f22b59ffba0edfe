"""Checkpoints: one .safetensors file, with its JSON (configuration, facts) in the file's metadata.

Nothing is unpickled. The fingerprint is a SHA-256 over the configuration and every tensor of the
network; features in a gallery carry it, so that those of two checkpoints are never compared.

A calibration may be added to the file later: its JSON in the metadata, its reference embeddings
among the tensors. It leaves the fingerprint as it is, since features do not depend on it, and has
a SHA-256 of its own, which also covers the fingerprint of the network that it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from model.atomic_file import write_whole
from model.calibration import Calibration, CalibrationFacts
from model.cmt import CMT
from model.config import MODALITIES, CMTConfig, Modality
from model.strict_json import read_json
from model.training_facts import TrainingFacts

FORMAT = "cmt-checkpoint"
VERSION = "1"
_LONGEST_REASON = 200
_REFERENCES = {modality: f"calibration.references.{modality}" for modality in MODALITIES}


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's metadata.

    fingerprint: SHA-256 (hex) over weights and configuration. training: facts of the run
    (dataset, identities, command, seed, evaluation). calibration: distance → probability, None
    until `store_calibration` added one.
    """

    fingerprint: str
    config: CMTConfig
    training: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    @property
    def facts(self) -> TrainingFacts:
        """Of `training` what programs read."""
        return TrainingFacts.model_validate(self.training)


def save_checkpoint(
    path: Path | str,
    model: CMT,
    *,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> CheckpointInfo:
    """Write `model` to `path`, atomically (a crash leaves the old file), and return its info.

    The file has no calibration: one belongs to the weights it was fitted on.

    dtype: of matrices and kernels, fp16 halves the file; vectors (norms, biases) stay fp32, since
    running variances do not fit fp16's range.
    Raises CheckpointError where a weight is not finite (in `dtype`).
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
    )
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": info.fingerprint,
        "config": info.config.model_dump_json(),
        "training": json.dumps(info.training),
        "calibration": json.dumps(None),
    }
    _write(path, tensors, metadata)
    return info


def store_calibration(
    path: Path | str, output: Path | str, calibration: Calibration, fingerprint: str
) -> None:
    """Write the checkpoint at `path` with this calibration to `output`, atomically.

    `output` may be `path`; a crash or a full disk leaves the old file. Weights, configuration and
    fingerprint stay as they are; a calibration that the file had is replaced. fingerprint: of the
    network that the calibration was fitted on.

    Raises CheckpointError where the file is no checkpoint, or one of another fingerprint by now.
    """
    path = Path(path)
    metadata, tensors, info = _checked(path)
    if info.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path} is not the checkpoint that was calibrated: it was replaced meanwhile; "
            "calibrate again"
        )
    text = calibration.facts.model_dump_json()
    references = {
        _REFERENCES[modality]: rows.half().contiguous()
        for modality, rows in calibration.references.items()
    }
    metadata |= {
        "calibration": text,
        "calibration_digest": _digest(fingerprint + text, references),
    }
    _write(Path(output), tensors | references, metadata)


def load_checkpoint(
    path: Path | str, device: torch.device | str = "cpu"
) -> tuple[CMT, CheckpointInfo]:
    """Read a checkpoint → (the network in fp32 and eval mode on `device`, its info).

    It modulates at the strength of its calibration.

    Raises CheckpointError, one sentence with the remedy, for a missing, damaged or altered file, a
    file of another kind, or a version that this release does not read.
    """
    _, tensors, info = _checked(Path(path))
    # A configuration may ask for any amount of memory: it is compared before any is taken.
    with torch.device("meta"), _Unfilled():
        model = CMT(info.config)
    expected = model.state_dict()
    if {n: t.shape for n, t in expected.items()} != {n: t.shape for n, t in tensors.items()}:
        raise CheckpointError(
            f"{path} holds other weights than its configuration needs; fetch it again"
        )
    # They take the places of the network's own, in fp32 however they are stored.
    model.load_state_dict({n: t.to(expected[n].dtype) for n, t in tensors.items()}, assign=True)
    if info.calibration is not None:
        model.strength = info.calibration.facts.strength
    return model.to(device).eval(), info


class _Unfilled(TorchFunctionMode):
    """Draw no numbers for new weights: on the device "meta" that loads torch's compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        if getattr(func, "__module__", None) == init.__name__:
            return given.get("tensor", *args[:1])
        return func(*args, **given)


def _checked(path: Path) -> tuple[dict[str, str], dict[str, Tensor], CheckpointInfo]:
    """A file's metadata, tensors and info. Raises CheckpointError where it is damaged."""
    metadata, tensors = _read(path)
    references = {m: tensors.pop(name) for m, name in _REFERENCES.items() if name in tensors}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file but no CMT checkpoint; give a file that `cmt train` "
            "wrote"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {_clipped(str(metadata.get('version')))}, this release "
            f"reads {VERSION}; use the release that wrote it, or train again"
        )
    try:
        info = CheckpointInfo(
            fingerprint=metadata["fingerprint"],
            config=CMTConfig.model_validate(read_json(metadata["config"])),
            training=_object(metadata["training"]),
        )
        info.facts  # noqa: B018 (they are of the right types, or this raises)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} has unreadable metadata ({_reason(error)}); fetch the file again"
        ) from error
    if _fingerprint(info.config, tensors) != info.fingerprint:
        raise CheckpointError(
            f"{path} does not match its fingerprint: it was altered or damaged; fetch it again"
        )
    calibration = _calibration(path, metadata, references, info)
    return metadata, tensors, replace(info, calibration=calibration)


def _calibration(
    path: Path,
    metadata: Mapping[str, str],
    references: dict[Modality, Tensor],
    info: CheckpointInfo,
) -> Calibration | None:
    text = metadata.get("calibration")
    digest = metadata.get("calibration_digest")
    if text == json.dumps(None) and digest is None and not references:
        return None
    named = {_REFERENCES[modality]: rows for modality, rows in references.items()}
    if text is None or digest != _digest(info.fingerprint + text, named):
        raise CheckpointError(
            f"the calibration in {path} was altered or damaged; fetch the file again, or run "
            "`cmt calibrate` on one without a calibration"
        )
    try:
        read_json(text)
        return Calibration(
            CalibrationFacts.model_validate_json(text), references, info.config.metric
        )
    except ValueError as error:
        raise CheckpointError(
            f"this release cannot read the calibration in {path} ({_reason(error)}); use the "
            "release that wrote it"
        ) from error


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, serialise(tensors, metadata))


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give the path of a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({_reason(error)}); fetch it again"
        ) from error


def _fingerprint(config: CMTConfig, tensors: Mapping[str, Tensor]) -> str:
    facts = config.model_dump()
    if not config.mirror:  # earlier releases knew no mirror image: their fingerprints stay
        del facts["mirror"]
    return _digest(json.dumps(facts, sort_keys=True), tensors)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over a text and named tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _object(text: str) -> dict[str, Any]:
    content = read_json(text)
    if not isinstance(content, dict):
        raise ValueError("the facts of the training are no JSON object")
    return content


def _reason(error: Exception) -> str:
    """An error in one short line; the text of a file may be anything."""
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        return _clipped(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return _clipped(str(error).splitlines()[0] if str(error) else type(error).__name__)


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
