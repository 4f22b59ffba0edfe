"""torch.compile and channels_last: chosen for a reason, and a failure is no end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model import CMT
from training.acceleration import Acceleration, choose_acceleration, decide_compile

CPU = torch.device("cpu")
PLAIN = Acceleration("a processor", "float32", "float32: measured", False, "channels_last off: …")


def decide(tiny_config, trial, switch="auto", steps=100_000, processes=1, start=PLAIN):
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
def test_a_run_that_cannot_gain_is_not_compiled(tiny_config, given, reason):
    model, decision = decide(tiny_config, lambda _: None, **given)
    assert reason in decision.compile_reason
    assert decision.compiled is False
    assert model.parts._compiled_call_impl is None


def test_a_network_that_does_not_compile_stays_as_it_is(tiny_config):
    def fails_compiled(model: CMT) -> None:
        if model.parts._compiled_call_impl is not None:
            raise RuntimeError("no C++ compiler\nand a long story")

    model, decision = decide(tiny_config, fails_compiled, "on")
    assert decision.compile_reason == "torch.compile off: it failed here (no C++ compiler)"
    assert model.parts._compiled_call_impl is None


def test_a_choice_says_why_and_flags_override_it(tiny_config):
    for switch, used in (("on", True), ("off", False)):
        choice = choose_acceleration(CPU, tiny_config, 8, "float32", switch)
        assert choice.channels_last is used
        assert choice.layout_reason == f"channels_last {switch}: set by --channels-last"
    measured = choose_acceleration(CPU, tiny_config, 8, "float32")
    assert "as fast with it" in measured.layout_reason
    assert measured.precision.dtype == torch.float32


def test_a_resumed_run_keeps_its_choice_on_the_same_device_only():
    saved = replace(PLAIN, channels_last=True, compiled=False)
    assert PLAIN.resumed(saved, "auto") == saved
    assert not PLAIN.resumed(saved, "off").channels_last
    assert PLAIN.resumed(replace(saved, device="another"), "auto") == PLAIN
