"""bf16 autocast, channels_last and torch.compile: each only where it measures faster here.

Each of them rounds in its own way, and a timing may come out differently the next time. So a choice
is made once in a run and kept in its folder, where a person may read it and repeat it: with another
one the same seed gives other weights. On another device it is made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter
from torch import nn

from model import CMT, CMTConfig
from model.backbone import TwoStreamResNet
from model.machine import machine
from model.precision import Precision, PrecisionName, choose_precision
from training.files import write_report
from training.state import TrainingError

Switch = Literal["auto", "on", "off"]

DECISION_FILE = "acceleration.json"

# torch.compile takes up to some minutes before the first step, and its trial as long: not worth it
# in a run that is over soon.
_LEAST_STEPS = 500
_LEAST_SECONDS = 3600.0
# A smaller gain is within the noise of a few steps.
_CLEAR_WIN = 1.05
# On a CPU a few images compare memory formats as well as a whole batch, which would take long.
_CPU_TRIAL_IMAGES = 16


@dataclass(frozen=True)
class Acceleration:
    """What a run uses on `device`, each with the sentence that says why.

    compiled is None until torch.compile has been decided on (`decide_compile`).
    """

    device: str
    dtype: str
    precision_reason: str
    channels_last: bool
    layout_reason: str
    compiled: bool | None = None
    compile_reason: str = "not decided yet"

    @property
    def precision(self) -> Precision:
        """The dtype of the network's products, as the trainer uses it."""
        return Precision(getattr(torch, self.dtype), self.precision_reason)

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def resumed(self, saved: Acceleration, channels_last: Switch) -> Acceleration:
        """`saved`, the choice of an interrupted run, if it was made on the same device.

        channels_last: not "auto" where the user chose again.
        """
        if saved.device != self.device:
            return self
        return saved.with_channels_last(channels_last)

    def with_channels_last(self, switch: Switch) -> Acceleration:
        """The same with the memory format that the user chose, unless "auto"."""
        if switch == "auto":
            return self
        return replace(self, channels_last=switch == "on", layout_reason=_layout_reason(switch))

    @property
    def as_options(self) -> str:
        """The options of `cmt train` that choose the same without a timing."""
        switches = {"--channels-last": self.channels_last, "--compile": bool(self.compiled)}
        words = [f"{option} {'on' if used else 'off'}" for option, used in switches.items()]
        return " ".join([f"--precision {self.dtype}", *words])

    @property
    def reasons(self) -> dict[str, str]:
        """For people and for the checkpoint's facts."""
        return {
            "device": self.device,
            "precision": self.precision_reason,
            "memory_format": self.layout_reason,
            "compile": self.compile_reason,
        }


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the processor, which a choice holds for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(machine()["cpu"])


def write_decision(folder: Path, acceleration: Acceleration) -> None:
    """Keep in a run's folder what was decided. Raises OSError."""
    content = {**asdict(acceleration), "options": acceleration.as_options}
    write_report(folder / DECISION_FILE, content)


def read_decision(
    folder: Path, device: torch.device, precision: PrecisionName
) -> Acceleration | None:
    """What was decided in a run's folder for this device, None where nothing was.

    precision: of the recipe; one that it states is no decision.
    Raises TrainingError where the file is damaged.
    """
    path = folder / DECISION_FILE
    if not path.is_file():
        return None
    try:
        saved = TypeAdapter(Acceleration).validate_json(path.read_bytes(), strict=True)
    except ValueError as error:
        raise TrainingError(
            f"{path} is damaged; remove it, and precision and memory format are measured again"
        ) from error
    if saved.device != device_name(device) or precision not in ("auto", saved.dtype):
        return None
    return saved


@lru_cache(maxsize=8)
def choose_acceleration(
    device: torch.device,
    network: CMTConfig,
    images: int,
    precision: PrecisionName = "auto",
    channels_last: Switch = "auto",
) -> Acceleration:
    """Measure precision, and memory format on the backbone of `network`; torch.compile comes later.

    images: of a batch. Takes about as long as eight steps, on a CPU at most those of 16 images.
    """
    chosen = choose_precision(device.type, precision)
    if channels_last != "auto":
        use, reason = channels_last == "on", _layout_reason(channels_last)
    else:
        ratio = _layout_gain(device, chosen, network, images)
        use = ratio > _CLEAR_WIN
        said = "on" if use else "off"
        reason = f"channels_last {said}: the backbone ran {ratio:.2f}× as fast with it"
    return Acceleration(
        device=device_name(device),
        dtype=str(chosen.dtype).removeprefix("torch."),
        precision_reason=chosen.reason,
        channels_last=use,
        layout_reason=reason,
    )


def _layout_reason(switch: Switch) -> str:
    return f"channels_last {switch}: set by --channels-last"


def decide_compile(
    acceleration: Acceleration,
    model: CMT,
    trial: Callable[[], None],
    device: torch.device,
    switch: Switch,
    steps: int,
    processes: int,
) -> Acceleration:
    """Compile the network's modules in place where that measures faster, or is switched on.

    trial: one forward and backward pass that leaves nothing behind. steps: how many are left.
    A network that does not compile stays as it is; the reason says so.
    """

    def decided(compiled: bool, reason: str) -> Acceleration:
        reason = f"torch.compile {'on' if compiled else 'off'}: {reason}"
        return replace(acceleration, compiled=compiled, compile_reason=reason)

    if switch == "off":
        return decided(False, "set by --compile")
    eager = None
    if switch == "auto":
        if acceleration.compiled is False:
            return acceleration
        if acceleration.compiled is None:
            if processes > 1:
                return decided(False, "not tried with several processes")
            if steps < _LEAST_STEPS:
                return decided(False, f"{steps} steps are too few for a trial to pay")
            eager = _seconds_of(trial, device)
            if steps * eager < _LEAST_SECONDS:
                return decided(False, f"a run of {steps * eager / 60:.0f} min is too short for it")
    _compile(model)
    try:
        compiled = _seconds_of(trial, device)
    except Exception as error:
        _forget(model)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return decided(False, f"it failed here ({first[:120]})")
    # What is compiled later, for another image size, falls back by itself.
    torch._dynamo.config.suppress_errors = True
    if switch == "on":
        return decided(True, "set by --compile")
    if eager is None:  # a resumed run that was compiled before
        return acceleration
    faster = eager / compiled >= _CLEAR_WIN
    if not faster:
        _forget(model)
    return decided(faster, f"a step took {compiled:.3g} s with it, {eager:.3g} s without")


def _parts(model: CMT) -> list[nn.Module]:
    """The modules that hold the work. The code between them sorts images by modality, which has
    no fixed shapes."""
    backbone = model.backbone
    parts = [*backbone.stems.values(), backbone.layer2, backbone.layer3, backbone.layer4]
    parts.append(model.parts)
    return parts if model.alignment is None else [*parts, model.alignment]


def _compile(model: CMT) -> None:
    for part in _parts(model):
        part.compile()


def _forget(model: CMT) -> None:
    for part in _parts(model):
        part._compiled_call_impl = None


def _layout_gain(
    device: torch.device, precision: Precision, network: CMTConfig, images: int
) -> float:
    """Seconds of the default memory format / those of channels_last, the best of two turns each."""
    if device.type == "cpu":
        images = min(images, _CPU_TRIAL_IMAGES)
    plain, channels_last = (
        _backbone_pass(device, precision, network, images, memory_format)
        for memory_format in (torch.contiguous_format, torch.channels_last)
    )
    seconds = [
        (_seconds_of(plain, device, 1), _seconds_of(channels_last, device, 1)) for _ in range(2)
    ]
    return min(first for first, _ in seconds) / min(second for _, second in seconds)


def _backbone_pass(
    device: torch.device,
    precision: Precision,
    network: CMTConfig,
    images: int,
    memory_format: torch.memory_format,
) -> Callable[[], None]:
    """Forward and backward of the backbone on images of both modalities."""
    with torch.random.fork_rng(devices=[]):
        backbone = TwoStreamResNet(network)
        batch = torch.randn(images, 3, network.input_height, network.input_width)
    backbone.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    batch = batch.to(device=device, memory_format=memory_format)
    is_ir = torch.arange(images, device=device) % 2 == 1

    def run() -> None:
        backbone.zero_grad(set_to_none=True)
        with torch.autocast(device.type, precision.dtype, enabled=precision.autocast):
            features = backbone(batch, is_ir)
        features.float().sum().backward()

    return run


def _seconds_of(run: Callable[[], None], device: torch.device, runs: int = 2) -> float:
    """The best of some runs after a first one, which builds kernels."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    best = float("inf")
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
