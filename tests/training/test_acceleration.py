"""torch.compile and channels_last: chosen for a reason, and a failure is no end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypedDict

import pytest
import torch

from model import CMT, CMTConfig
from training.acceleration import Acceleration, Switch, choose_acceleration, decide_compile

CPU = torch.device("cpu")
PLAIN = Acceleration("a processor", "float32", "float32: measured", False, "channels_last off: …")


class Given(TypedDict, total=False):
    """What `decide` may be told."""

    switch: Switch
    steps: int
    processes: int
    start: Acceleration


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What torch.compile is given, whose results fail when they are called."""
    given: list[object] = []

    def fails(*_: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long story")

    def compile(call: object) -> Callable[..., None]:
        given.append(call)
        return fails

    monkeypatch.setattr(torch, "compile", compile)
    return given


def decide(
    tiny_config: CMTConfig,
    trial: Callable[[CMT], None],
    switch: Switch = "auto",
    steps: int = 100_000,
    processes: int = 1,
    start: Acceleration = PLAIN,
) -> tuple[CMT, Acceleration]:
    model = CMT(tiny_config)
    return model, decide_compile(start, model, lambda: trial(model), CPU, switch, steps, processes)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"steps": 100}, "100 steps are too few"),
        ({"steps": 600}, "is too short for it"),
        ({"processes": 2}, "not tried with several processes"),
        ({"switch": "off"}, "set by --compile"),
        ({"start": replace(PLAIN, compiled=False, compile_reason="as before")}, "as before"),
    ],
)
def test_a_run_that_cannot_gain_is_not_compiled(
    tiny_config: CMTConfig, compiled: list[object], given: Given, reason: str
) -> None:
    _, decision = decide(tiny_config, lambda _: None, **given)
    assert reason in decision.compile_reason
    assert decision.compiled is False
    assert not compiled


def test_a_network_that_does_not_compile_stays_as_it_is(
    tiny_config: CMTConfig, compiled: list[object]
) -> None:
    images = torch.rand(2, 3, tiny_config.input_height, tiny_config.input_width)

    def trial(model: CMT) -> None:
        model(images, ["rgb", "ir"])

    model, decision = decide(tiny_config, trial, "on")
    assert decision.compile_reason == "torch.compile off: it failed here (no C++ compiler)"
    assert compiled
    trial(model)  # every module of it runs as before


def test_a_choice_says_why_and_flags_override_it(tiny_config: CMTConfig) -> None:
    for switch, used in (("on", True), ("off", False)):
        choice = choose_acceleration(CPU, tiny_config, 8, "float32", switch)
        assert choice.channels_last is used
        assert choice.layout_reason == f"channels_last {switch}: set by --channels-last"
    measured = choose_acceleration(CPU, tiny_config, 8, "float32")
    assert "as fast with it" in measured.layout_reason
    assert measured.precision.dtype == torch.float32


def test_a_resumed_run_keeps_its_choice_on_the_same_device_only() -> None:
    saved = replace(PLAIN, channels_last=True, compiled=False)
    assert PLAIN.resumed(saved, "auto") == saved
    assert not PLAIN.resumed(saved, "off").channels_last
    assert PLAIN.resumed(replace(saved, device="another"), "auto") == PLAIN
